// SPDX-License-Identifier: GPL-2.0-only
/*
 * Which threads are inside a call of librsplice: from the probe "reserve" to that of the call's
 * end (usdt.c). What such a thread does is counted in tallies of its own, so that what the library
 * meant to do and what the kernel did can be held against each other.
 *
 * USDT is 0 where no file with such probes was found: then all of this costs nothing.
 */
#if USDT
#define F_RSPLICE (1 << 13) /* flag of a key, as those in maps.h */

struct inside {
	u64 process;
	u64 depth; /* calls that are open: a batch opens several */
	u64 bytes; /* that they reserved */
	u64 size;  /* of the file that the last one fills, as it began */
	u32 in;	   /* descriptors of the last one */
	u32 out;
	u32 refers;	 /* to pages of the source, which it has not made */
	u32 interrupted; /* a signal was delivered */
};
BPF_TABLE("lru_hash", u32, struct inside, usdt_inside, 4096); /* by thread */
/* Calls open anywhere. While there are none, a system call is not asked whose it is. */
BPF_ARRAY(usdt_nr_open, u64, 1);

static __always_inline void count_open(s64 change)
{
	u32 zero = 0;
	u64 *nr_open = usdt_nr_open.lookup(&zero);

	if (nr_open)
		__sync_fetch_and_add(nr_open, change);
}

static __always_inline u32 inside_flag(u64 process, u64 task)
{
	u32 zero = 0, tid;
	u64 *nr_open = usdt_nr_open.lookup(&zero);
	struct inside *inside;

	if (!nr_open || !*nr_open)
		return 0;
	tid = read32(task + TASK_PID);
	inside = usdt_inside.lookup(&tid);
	/* A thread that died inside, and whose number another process has now, does not count. */
	return inside && inside->process == process ? F_RSPLICE : 0;
}

/* Whether the pages that the current thread handles are librsplice's own. */
static __always_inline bool handles_own_pages(u64 process, u64 task)
{
	u32 tid = read32(task + TASK_PID);
	struct inside *inside;

	if (!inside_flag(process, task))
		return false;
	inside = usdt_inside.lookup(&tid);
	return inside && !inside->refers;
}
#else
static __always_inline u32 inside_flag(u64 process, u64 task)
{
	return 0;
}

static __always_inline bool handles_own_pages(u64 process, u64 task)
{
	return false;
}
#endif
