// SPDX-License-Identifier: GPL-2.0-only
/*
 * FUSE over io_uring (6.14, fs/fuse/dev_uring.c): a request comes with the completion of a command,
 * the reply goes with the next command. Arguments go by the server's payload buffer, headers by
 * another, which are protocol. Since 7.3 the pages of READ and WRITE may be left out: the server
 * reaches them by the ring's table of buffers.
 */
#if HAVE_FUSE_RING
#define CMD_REGISTER	     1
#define CMD_COMMIT_AND_FETCH 2
#define FUSE_WRITE	     16
#define FUSE_READ	     15

/* Bytes of *nr* arguments from *first* on; the last ones are pages. */
static __always_inline u64 bytes_of_arguments(u64 array, u32 nr, u32 first, bool without_pages)
{
	u64 bytes = 0;
	u32 i;

#pragma clang loop unroll(disable)
	for (i = first; i < 4; i++) {
		if (i + without_pages >= nr)
			break;
		bytes += (u32)read32(array + i * FUSE_ARG_STRIDE + FUSE_ARG_SIZE);
	}
	return bytes;
}

/* Whether the server reaches the request's pages in place (can_zero_copy_req()). */
static __always_inline bool in_place(u64 request, u64 args, u32 opcode)
{
#if FUSE_ZERO_COPY
	return (u32)read32(request + FUSE_REQ_OPCODE) == opcode &&
	       read8(read64(request + FUSE_REQ_QUEUE) + FUSE_QUEUE_ZERO_COPY) &&
	       read8(args + FUSE_ARGS_ZERO_COPY / 8) >> FUSE_ARGS_ZERO_COPY % 8 & 1;
#else
	return false;
#endif
}

static __always_inline bool came_by_ring(u64 request)
{
	return read64(request + FUSE_REQ_QUEUE) != 0;
}

/* Of a reply: what it says of itself is the server's word, and may be anything. */
static __always_inline u64 ring_reply_length(u64 request, bool without_pages)
{
	u64 args = read64(request + FUSE_REQ_ARGS);

	return bytes_of_arguments(args + FUSE_ARGS_OUT, read8(args + FUSE_ARGS_NR_OUT), 0,
				  without_pages);
}

static __always_inline u64 ring_request_length(u64 request)
{
	u64 args = read64(request + FUSE_REQ_ARGS);

	/* The first argument is a header of its own. */
	return bytes_of_arguments(args + FUSE_ARGS_IN, read8(args + FUSE_ARGS_NR_IN), 1,
				  in_place(request, args, FUSE_WRITE));
}

static __always_inline void count_ring_message(struct call *call, u64 request, u64 task)
{
	struct tally *tally;
	struct key key;

	call->source.file = call->destination.file = 0;
	call->source.direct = call->destination.direct = 0;
	call->source.dax = call->destination.dax = 0;
	call->flags = 0;
	forget();
	fill_key(&key, call, task);
	tally = call->bytes ? tally_of(&key, &call->place) : 0;
	if (tally) {
		tally->operations++;
		tally->bytes += call->bytes;
	}
#if MEASURED
	take_ring_copies(&key, request);
#endif
}

/* A command is complete: its entry of the ring has a request. */
static __always_inline void count_ring_request(struct call *call, u64 command, u64 task)
{
	u32 operation = read32(command + COMMAND_OP);
	u64 request;

	if (operation != CMD_REGISTER && operation != CMD_COMMIT_AND_FETCH)
		return;
	request = read64(read64(command + COMMAND_PDU + FUSE_PDU_ENTRY) + FUSE_ENTRY_REQ);
	if (!request)
		return;
	call->source.id = END_FUSE_DEVICE;
	call->destination.id = END_USER;
	call->bytes = ring_request_length(request);
	count_ring_message(call, request, task);
}

/* A request ends: by a reply, or by what has come between. */
static __always_inline void count_ring_reply(u64 request)
{
	u64 task = bpf_get_current_task(), args = read64(request + FUSE_REQ_ARGS);
	struct call *call = call_at(AT_REPLY);

	if (!call || !came_by_ring(request))
		return;
	call->process = current_process();
	if (!call->process)
		return;
	call->source.id = END_USER;
	call->destination.id = END_FUSE_DEVICE;
	call->via = VIA_FUSE_REPLY;
	call->bytes = 0;
	if (!(u32)read32(request + FUSE_REPLY_ERROR))
		call->bytes = ring_reply_length(request, in_place(request, args, FUSE_READ));
	count_ring_message(call, request, task);
}

#if !(HAVE_IDENTITY && IDENTITY)
int tp_fuse_request_end(u64 *ctx)
{
	count_ring_reply(tracepoint_arg(ctx, 0));
	return 0;
}
#endif
#endif
