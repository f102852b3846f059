// SPDX-License-Identifier: GPL-2.0-only
/* Who is followed: thread groups, by a key that pid reuse cannot repeat. */

static __always_inline u64 process_key(u32 pid)
{
	return (u64)pid << 32 | (u32)bpf_ktime_get_ns();
}

/* Adds a thread group. Its key, or 0 when the maps are full. */
static __always_inline u64 follow(u32 pid, u64 task)
{
	struct process process = {.pid = pid};
	u64 key = process_key(pid);

	read_kernel(process.comm, sizeof(process.comm), (void *)(task + TASK_COMM));
	if (followed.update(&pid, &key) || processes.update(&key, &process)) {
		count_lost(LOST_PROCESS);
		return 0;
	}
	return key;
}

/* The key of thread group *pid*, whose task is *task*; 0 when it is not followed. */
static __always_inline u64 process_of(u32 pid, u64 task)
{
	u64 *key = followed.lookup(&pid);

	if (key)
		return *key;
#if FOLLOW_ALL
	if (pid && pid != SELF_PID)
		return follow(pid, task);
#endif
	return 0;
}

static __always_inline u64 current_process(void)
{
	return process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task());
}
