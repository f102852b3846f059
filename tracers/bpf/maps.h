// SPDX-License-Identifier: GPL-2.0-only
/* What is kept in the kernel, and read by tracer.py. Sizes come from tracer.py. */

/* Dispositions that the kernel side can establish; the order is that of tracer.py. */
enum disposition { COPIED, SHARED, MOVED, DIRECT_IO, REMAPPED, DISCARDED, NR_DISPOSITIONS };

/* Flags of a key; the order is that of tracer.py. */
enum {
	F_COMPAT = 1 << 0,
	F_ZEROCOPY = 1 << 1,
	F_LOOPBACK = 1 << 2,
	F_TRUNC = 1 << 3,
	F_PEEK = 1 << 4,
	F_MOVE = 1 << 5,
	F_GIFT = 1 << 6,
	F_REMAP = 1 << 7,
	F_ERRQUEUE = 1 << 8,
	F_SRC_DIRECT = 1 << 9,
	F_SRC_DAX = 1 << 10,
	F_DST_DIRECT = 1 << 11,
	F_DST_DAX = 1 << 12,
};

/* Calls that look alike. Ends are encoded as in ends.h. */
struct key {
	u64 process;
	u64 source;
	u64 destination;
	u32 via;
	u32 flags;
};

struct tally {
	u64 operations;
	u64 bytes;			  /* carried by each leg */
	u64 identity[2][NR_DISPOSITIONS]; /* bytes whose pages were seen at both ends, by leg */
	u64 measured_copied;		  /* bytes counted by the kernel's own copying functions */
	u64 queued_mapped;		  /* pages queued in a pipe while in some page table */
};

struct process {
	u32 pid;
	u32 ended; /* or LET_GO */
	char comm[16];
	u64 parent; /* key of the process that started it, 0 for those that tracer.py follows */
	u64 aside;  /* as of a call (asides.h): of the thread that started it */
};

struct page_counts {
	u64 faults;
	u64 mapped;
	u64 inserted;
	u64 removed;
};

/* What other probes learned during the call that a task is in. */
struct note {
	u64 copied;	/* bytes counted by skb_copy_datagram_iter */
	u64 fuse_bytes; /* bytes of whole pages that a FUSE reply moved */
	u64 fuse_pages; /* pages of READ replies that were compared */
};

enum lost {
	LOST_TALLY,
	LOST_PROCESS,
	LOST_CQE_SKIPPED,
	LOST_REQUESTS,
	LOST_MESSAGES,
	LOST_FINDING,
	NR_LOST,
};

BPF_ARRAY(call_table, u64, TABLE_SIZE);
BPF_ARRAY(uring_table, u64, 256);
BPF_HASH(followed, u32, u64, MAX_PROCESSES); /* thread group -> key of the process */
BPF_HASH(processes, u64, struct process, MAX_PROCESSES);
BPF_TABLE("percpu_hash", struct key, struct tally, tallies, MAX_TALLIES);
BPF_TABLE("percpu_hash", u64, struct page_counts, page_counts, MAX_PROCESSES);
BPF_TABLE("lru_hash", u32, struct note, notes, 4096);
BPF_TABLE("percpu_array", u32, u64, lost, NR_LOST);
BPF_ARRAY(nr_started, u64, 1);
BPF_ARRAY(nr_ended, u64, 1); /* processes that have ended: the reader makes room for others */

struct name {
	char text[32];
};
BPF_HASH(filesystem_names, u64, struct name, 256);

/*
 * Where programs run. From 7.0 on another task's may run in between on the same CPU, as long as it
 * is not the same one (__bpf_trace_run(), kernel/trace/bpf_trace.c): each has a place of its own.
 */
enum place_of_program {
	AT_ENTER,
	AT_EXIT,
	AT_END,
	AT_SUBMIT,
	AT_COMPLETE,
	AT_REPLY,
	NR_PROGRAM_PLACES,
};

static __always_inline void count_many_lost(u32 what, u64 events)
{
	u64 *count = lost.lookup(&what);

	if (count)
		*count += events;
}

static __always_inline void count_lost(u32 what)
{
	count_many_lost(what, 1);
}
