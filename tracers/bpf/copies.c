// SPDX-License-Identifier: GPL-2.0-only
/*
 * Functions of the kernel that copy payload, at their return: providers.py lists which,
 * and attaches these programs to them. copied_SIDE_N is for functions of N arguments that return
 * the bytes they copied, copied_SIDE_ax for a kretprobe at any of them; the others look closer.
 *
 * What is for kretprobes too reads by peek64() alone: read8() to read64() are for tracing programs.
 */
#if MEASURED
#define PF_KTHREAD	 0x00200000
#define MSG_SPLICE_PAGES 0x8000000

static __always_inline u64 peek64(u64 address)
{
	u64 value = 0;

	read_kernel(&value, sizeof(value), (void *)address);
	return value;
}

/* A trampoline has a function's arguments in a row, a breakpoint at its entry in registers. */
#define AT_ENTRY(name)                                                                             \
	int name(u64 *ctx)                                                                         \
	{                                                                                          \
		return name##_at(tracepoint_arg(ctx, 0), tracepoint_arg(ctx, 1));                  \
	}                                                                                          \
	int name##_regs(u64 *ctx)                                                                  \
	{                                                                                          \
		return name##_at(tracepoint_arg(ctx, REGS_ARG0 / 8),                               \
				 tracepoint_arg(ctx, REGS_ARG1 / 8));                              \
	}

/*
 * What functions were called with: a breakpoint at the return has the result alone, so one at the
 * entry keeps the arguments for it. Of a thread and a function the last call is kept.
 */
struct kept_call {
	u64 args[4];
};
struct kept_call_key {
	u32 tid;
	u32 function;
};
/* Not one that evicts: a thread may sleep in its call, and come back for its arguments. */
BPF_HASH(kept_calls, struct kept_call_key, struct kept_call, 8192);

static __always_inline int keep_call(u64 *ctx, u32 function)
{
	struct kept_call_key key = {.tid = bpf_get_current_pid_tgid(), .function = function};
	struct kept_call call = {
		.args = {tracepoint_arg(ctx, REGS_ARG0 / 8), tracepoint_arg(ctx, REGS_ARG1 / 8),
			 tracepoint_arg(ctx, REGS_ARG2 / 8), tracepoint_arg(ctx, REGS_CX / 8)}};

	if (kept_calls.update(&key, &call) &&
	    process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task()))
		count_lost(LOST_TALLY);
	return 0;
}

static __always_inline u64 *kept_args(u32 function)
{
	struct kept_call_key key = {.tid = bpf_get_current_pid_tgid(), .function = function};
	struct kept_call *call = kept_calls.lookup(&key);

	return call ? call->args : 0;
}

static __always_inline void end_call(u32 function)
{
	struct kept_call_key key = {.tid = bpf_get_current_pid_tgid(), .function = function};

	kept_calls.delete(&key);
}

/* A trampoline has the result behind the arguments, nr of them; 0: the result does not matter. */
#define AT_RETURN(name, nr)                                                                        \
	enum { name##_function = __COUNTER__ };                                                    \
	int name(u64 *ctx)                                                                         \
	{                                                                                          \
		return name##_at(ctx, tracepoint_arg(ctx, nr));                                    \
	}                                                                                          \
	int name##_entry(u64 *ctx)                                                                 \
	{                                                                                          \
		return keep_call(ctx, name##_function);                                            \
	}                                                                                          \
	int name##_return(u64 *ctx)                                                                \
	{                                                                                          \
		u64 *args = kept_args(name##_function);                                            \
                                                                                                   \
		if (args)                                                                          \
			name##_at(args, tracepoint_arg(ctx, REGS_AX / 8));                         \
		end_call(name##_function);                                                         \
		return 0;                                                                          \
	}

static __always_inline int count_copied(u32 side, s64 bytes)
{
	u64 who = bpf_get_current_pid_tgid(), task = bpf_get_current_task();
	struct copied none = {}, *copied;
	u64 *request;
	u32 tid = who;

	if (bytes <= 0)
		return 0;
	if (peek64(task + TASK_FLAGS) & PF_KTHREAD) {
		count_outside(KERNEL_THREADS, bytes);
		return 0;
	}
	if (!process_of(who >> 32, task))
		return 0;
	request = served.lookup(&tid);
	copied = request ? copied_for.lookup_or_try_init(request, &none)
			 : copied_by.lookup_or_try_init(&tid, &none);
	if (copied)
		copied->bytes[side] += bytes;
	else
		count_lost(LOST_TALLY);
	return 0;
}

#define COPIED(side, name, place)                                                                  \
	int copied_##name(u64 *ctx)                                                                \
	{                                                                                          \
		return count_copied(side, (s64)tracepoint_arg(ctx, place));                        \
	}

COPIED(SIDE_IN, in_1, 1)
COPIED(SIDE_IN, in_2, 2)
COPIED(SIDE_IN, in_3, 3)
COPIED(SIDE_IN, in_4, 4)
COPIED(SIDE_IN, in_7, 7)
COPIED(SIDE_IN, in_ax, REGS_AX / 8)
COPIED(SIDE_OUT, out_2, 2)
COPIED(SIDE_OUT, out_3, 3)
COPIED(SIDE_OUT, out_4, 4)
COPIED(SIDE_OUT, out_5, 5)
COPIED(SIDE_OUT, out_ax, REGS_AX / 8)

/* Before 6.5 a splice reads into an iterator of pipe buffers, which take pages by reference. */
static __always_inline bool takes_pages(u64 iter)
{
	u64 type = peek64(iter + ITER_TYPE);

	return ITER_PIPE && (ITER_TYPE_SIZE == 1 ? (u8)type == ITER_PIPE : type & ITER_PIPE);
}

/* filemap_read(iocb, iter, already_read): what O_DIRECT has read before is part of the result. */
static __always_inline int copied_filemap_read_at(u64 *args, u64 result)
{
	if (takes_pages(tracepoint_arg(args, 1)))
		return 0;
	return count_copied(SIDE_IN, (s64)result - (s64)tracepoint_arg(args, 2));
}
AT_RETURN(copied_filemap_read, 3)

/* The read_iter(iocb, iter) of files that live in memory. */
static __always_inline int copied_read_iter_at(u64 *args, u64 result)
{
	if (takes_pages(tracepoint_arg(args, 1)))
		return 0;
	return count_copied(SIDE_IN, (s64)result);
}
AT_RETURN(copied_read_iter, 2)

/* skb_copy_datagram_from_iter(skb, offset, from, len) returns 0. */
static __always_inline int copied_skb_copy_datagram_from_iter_at(u64 *args, u64 result)
{
	return (s32)result ? 0 : count_copied(SIDE_OUT, (s32)tracepoint_arg(args, 3));
}
AT_RETURN(copied_skb_copy_datagram_from_iter, 4)

/* ip_generic_getfrag(from, to, offset, len, odd, skb) returns 0. */
static __always_inline int copied_ip_generic_getfrag_at(u64 *args, u64 result)
{
	return (s32)result ? 0 : count_copied(SIDE_OUT, (s32)tracepoint_arg(args, 3));
}
AT_RETURN(copied_ip_generic_getfrag, 6)

/*
 * tcp_sendmsg_locked(sk, msg, size) takes pages by reference for MSG_SPLICE_PAGES (6.5), and for
 * MSG_ZEROCOPY where the socket or the caller (io_uring, by msg_ubuf) asked for it.
 */
static __always_inline int copied_tcp_sendmsg_locked_at(u64 *args, u64 result)
{
	u64 msg = tracepoint_arg(args, 1);
	u32 flags = peek64(msg + MSGHDR_FLAGS);
	bool by_reference = flags & MSG_SPLICE_PAGES;

#if HAVE_ZEROCOPY
	if (flags & MSG_ZEROCOPY)
		by_reference |=
			peek64(tracepoint_arg(args, 0) + SOCK_FLAGS) >> SOCK_ZEROCOPY_BIT & 1;
#endif
	if (flags & MSG_ZEROCOPY && MSGHDR_UBUF)
		by_reference |= peek64(msg + MSGHDR_UBUF) != 0;
	return by_reference ? 0 : count_copied(SIDE_OUT, (s32)result);
}
AT_RETURN(copied_tcp_sendmsg_locked, 3)

#if HAVE_NETWORK
/*
 * skb_copy_ubufs(skb, gfp) copies the pages of a zero-copy send, mostly in an interrupt on the
 * sender's time, or on a kernel thread's.
 */
static __always_inline int copied_skb_copy_ubufs_at(u64 *args, u64 result)
{
	u64 task = bpf_get_current_task();

	if ((s32)result < 0)
		return 0;
	if (process_of(bpf_get_current_pid_tgid() >> 32, task) ||
	    peek64(task + TASK_FLAGS) & PF_KTHREAD)
		count_outside(PACKETS, (u32)peek64(tracepoint_arg(args, 0) + SKB_DATA_LEN));
	return 0;
}
AT_RETURN(copied_skb_copy_ubufs, 2)
#endif

/*
 * fuse_copy_do(cs, val, size) copies nothing without val. Over a ring a server gets requests in
 * task work, and answers several in one call: there the bytes are the request's, not the thread's.
 */
static __always_inline int copied_fuse_copy_do_at(u64 *args, u64 result)
{
	s32 bytes = result;

	if (!tracepoint_arg(args, 1))
		return 0;
#if HAVE_FUSE_RING
	{
		u64 request = peek64(tracepoint_arg(args, 0) + FUSE_COPY_REQ);
		u64 task = bpf_get_current_task();
		struct copied none = {}, *own;

		if (request && peek64(request + FUSE_REQ_QUEUE)) {
			if (!process_of(bpf_get_current_pid_tgid() >> 32, task))
				return 0;
			own = copied_over_ring.lookup_or_try_init(&request, &none);
			if (own)
				own->bytes[SIDE_OUT] += bytes;
			else
				count_lost(LOST_TALLY);
			return 0;
		}
	}
#endif
	return count_copied(SIDE_OUT, bytes);
}
AT_RETURN(copied_fuse_copy_do, 3)

/* Whether a request of an io_uring is a leg. */
static __always_inline bool is_leg(u64 request)
{
	u32 opcode = peek64(request + KIOCB_OPCODE) & 0xff;
	u64 *entry = uring_table.lookup(&opcode);

	return entry && *entry && (*entry & 0xff) != SHAPE_COMMAND;
}

/*
 * io_issue_sqe(req, ...) begins: what its thread copies is the request's from now on. At the return
 * that would be too late: where a worker serves a ring whose own thread completes requests
 * (IORING_SETUP_DEFER_TASKRUN, 6.1), the request is complete by then, and maybe another one.
 */
static __always_inline int copied_request_begins_at(u64 request, u64 flags)
{
	u64 who = bpf_get_current_pid_tgid();
	u32 tid = who;

	if (process_of(who >> 32, bpf_get_current_task()) && is_leg(request))
		served.update(&tid, &request);
	return 0;
}
AT_ENTRY(copied_request_begins)

/*
 * io_issue_sqe(req, ...) ends. What was not told to be the request's from its begin is so now, if
 * it is a leg. It must not be left to the next request, which is likely to be kept at the same
 * address.
 */
static __always_inline int copied_request_at(u64 *args, u64 result)
{
	u64 request = tracepoint_arg(args, 0);
	u32 tid = bpf_get_current_pid_tgid();
	struct copied none = {}, *mine = copied_by.lookup(&tid), *own;

	if (served.lookup(&tid)) {
		served.delete(&tid);
		return 0;
	}
	if (!mine || (!mine->bytes[SIDE_IN] && !mine->bytes[SIDE_OUT]))
		return 0;
	if (!is_leg(request)) {
		count_outside(OTHER_CALLS, mine->bytes[SIDE_IN] + mine->bytes[SIDE_OUT]);
		mine->bytes[SIDE_IN] = mine->bytes[SIDE_OUT] = 0;
		return 0;
	}
	own = copied_for.lookup_or_try_init(&request, &none);
	if (own)
		move_copied(mine, own);
	return 0;
}
AT_RETURN(copied_request, 0)

/* The module's tracepoint: (whether the copying goes to the iterator, bytes). */
int copied_module(u64 *ctx)
{
	return count_copied(tracepoint_arg(ctx, 0) & 1 ? SIDE_IN : SIDE_OUT,
			    (s64)tracepoint_arg(ctx, 1));
}

/* filemap_map_pages(vmf, first, last): what the tracepoint of the same name tells since 6.14. */
static __always_inline int map_pages_at(u64 *args, u64 result)
{
	struct page_counts *counts = current_page_counts();

	if (counts)
		counts->mapped += tracepoint_arg(args, 2) - tracepoint_arg(args, 1) + 1;
	return 0;
}
AT_RETURN(map_pages, 0)
#endif
