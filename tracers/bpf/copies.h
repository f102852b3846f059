// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bytes that the kernel copies, counted where it copies: by functions that call the copying
 * functions (copies.c), or by a module at these themselves (kmod/rsplice_copies.c). A thread's
 * bytes are kept until its call returns and tells which leg they belong to.
 *
 * MEASURED is 0 where nothing of the kind can be attached: then all of this costs nothing.
 */
#if MEASURED
/* Which half of a call copied: the first leg of sendfile or its second, the only one of others. */
enum side { SIDE_IN, SIDE_OUT, NR_SIDES };

/* Copies that belong to no leg; the order is that of copies.py. */
enum outside { OTHER_CALLS, KERNEL_THREADS, PACKETS, NR_OUTSIDE };

struct copied {
	u64 bytes[NR_SIDES];
};
BPF_TABLE("lru_hash", u32, struct copied, copied_by, 4096);    /* thread */
BPF_TABLE("lru_hash", u64, struct copied, copied_for, 4096);   /* request of an io_uring */
BPF_TABLE("lru_hash", u32, u64, served, 4096);		       /* thread: the request it is in */
BPF_TABLE("percpu_array", u32, struct copied, copied_last, 1); /* in the call that returns */
#if HAVE_FUSE_RING
BPF_TABLE("lru_hash", u64, struct copied, copied_over_ring, 4096); /* request of FUSE */
#endif
BPF_TABLE("percpu_array", u32, u64, copied_outside, NR_OUTSIDE);
BPF_TABLE("percpu_hash", struct key, struct copied, copied_tallies, MAX_TALLIES);

static __always_inline void count_outside(u32 where, u64 bytes)
{
	u64 *sum = copied_outside.lookup(&where);

	if (sum)
		*sum += bytes;
}

static __always_inline void move_copied(struct copied *from, struct copied *to)
{
	to->bytes[SIDE_IN] += from->bytes[SIDE_IN];
	to->bytes[SIDE_OUT] += from->bytes[SIDE_OUT];
	from->bytes[SIDE_IN] = from->bytes[SIDE_OUT] = 0;
}

/*
 * A call returns: what its thread copied is this call's. What nobody took of the call before is
 * no leg's: exec, a call that failed. Interrupts copy nothing that is counted by thread.
 */
static __always_inline void end_copies(u64 process)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid();
	struct copied *last = copied_last.lookup(&zero), *mine;

	if (!process || !last)
		return;
	count_outside(OTHER_CALLS, last->bytes[SIDE_IN] + last->bytes[SIDE_OUT]);
	last->bytes[SIDE_IN] = last->bytes[SIDE_OUT] = 0;
	mine = copied_by.lookup(&tid);
	if (mine)
		move_copied(mine, last);
}

static __always_inline void book_copies(struct key *key, struct copied *from, u64 protocol)
{
	struct copied none = {}, *sum;

	if (!from->bytes[SIDE_IN] && !from->bytes[SIDE_OUT])
		return;
	if (from->bytes[SIDE_OUT] >= protocol)
		from->bytes[SIDE_OUT] -= protocol;
	sum = copied_tallies.lookup_or_try_init(key, &none);
	if (sum)
		move_copied(from, sum);
	else
		count_lost(LOST_TALLY);
}

/* The call that returns is a leg of *key*. The first bytes of a reply are protocol, no payload. */
static __always_inline void take_call_copies(struct key *key, u64 protocol)
{
	u32 zero = 0;
	struct copied *last = copied_last.lookup(&zero);

	if (last)
		book_copies(key, last, protocol);
}

/* A request of an io_uring is complete: its own bytes, else what its thread has just copied. */
static __always_inline void take_request_copies(struct key *key, u64 request, u64 bytes)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct copied *own = copied_for.lookup(&request), *mine;

	if (own) {
		book_copies(key, own, 0);
		copied_for.delete(&request);
		return;
	}
	mine = copied_by.lookup(&tid);
	if (mine && mine->bytes[SIDE_IN] + mine->bytes[SIDE_OUT] <= bytes)
		book_copies(key, mine, 0);
}

/* A request that failed is no leg, and the next one is likely to be kept at the same address. */
static __always_inline void drop_request_copies(u64 request)
{
	struct copied *own = copied_for.lookup(&request);

	if (!own)
		return;
	count_outside(OTHER_CALLS, own->bytes[SIDE_IN] + own->bytes[SIDE_OUT]);
	copied_for.delete(&request);
}

#if HAVE_FUSE_RING
/* What was copied for a request of FUSE, to the server's memory or out of it, is a leg of *key*. */
static __always_inline void take_ring_copies(struct key *key, u64 request)
{
	struct copied *own = copied_over_ring.lookup(&request);

	if (own)
		book_copies(key, own, 0);
	copied_over_ring.delete(&request);
}
#endif
#endif
