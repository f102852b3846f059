// SPDX-License-Identifier: GPL-2.0-only
/* Who is followed: thread groups, by a key that pid reuse cannot repeat. */

static __always_inline u64 process_key(u32 pid)
{
	return (u64)pid << 32 | (u32)bpf_ktime_get_ns();
}

/*
 * Most calls of the machine are of processes that nobody follows, and pay for the question. So it
 * is answered from an array, which costs no function call: at the pid's low bits stands the key
 * of the process that is followed there, 0 for none, or CROWDED where two have met and only the
 * hash can tell.
 */
#define CROWDED 1
BPF_ARRAY(slots, u64, SLOTS);

static __always_inline u64 *slot_of(u32 pid)
{
	u32 index = pid & (SLOTS - 1);

	return slots.lookup(&index);
}

/* Adds a thread group. Its key, or 0 when the maps are full. */
static __always_inline u64 follow(u32 pid, u64 task, u64 parent, u64 aside)
{
	struct process process = {.pid = pid, .parent = parent, .aside = aside};
	u64 key = process_key(pid), *slot = slot_of(pid);

	read_kernel(process.comm, sizeof(process.comm), (void *)(task + TASK_COMM));
	if (!slot || processes.update(&key, &process) || followed.update(&pid, &key)) {
		count_lost(LOST_PROCESS);
		return 0;
	}
	*slot = *slot && *slot >> 32 != pid ? CROWDED : key;
	return key;
}

static __always_inline void unfollow(u32 pid)
{
	u64 *slot = slot_of(pid);

	if (slot && *slot >> 32 == pid)
		*slot = 0;
	followed.delete(&pid);
}

/* The key of thread group *pid*, whose task is *task*; 0 when it is not followed. */
static __always_inline u64 process_of(u32 pid, u64 task)
{
	u64 *slot = slot_of(pid), *key;

	if (slot && *slot >> 32 == pid)
		return *slot;
	if (slot && *slot == CROWDED) {
		key = followed.lookup(&pid);
		if (key)
			return *key;
	}
#if FOLLOW_ALL
	if (pid && pid != SELF_PID)
		return follow(pid, task, 0, 0);
#endif
	return 0;
}

static __always_inline u64 process_of_task(u64 task)
{
	return process_of(read32(task + TASK_TGID), task);
}

static __always_inline u64 current_process(void)
{
	return process_of_task(bpf_get_current_task());
}
