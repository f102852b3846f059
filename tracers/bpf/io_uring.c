// SPDX-License-Identifier: GPL-2.0-only
/*
 * io_uring: counted at completion, wherever that runs, for the task that submitted.
 * A completion that is not posted (IOSQE_CQE_SKIP_SUCCESS) is not seen: counted as lost.
 */
#if HAVE_IO_URING
#define CQE_F_MORE	     2
#define CQE_F_NOTIF	     8
#define NOTIF_COPIED	     0x80000000u /* IORING_NOTIF_USAGE_ZC_COPIED */
#define REPORT_USAGE	     8		 /* IORING_SEND_ZC_REPORT_USAGE */
#define REQ_F_CQE_SKIP	     (1 << 6)
#define SPLICE_F_FD_IN_FIXED (1U << 31)
#define FIXED_BUF	     4 /* IORING_RECVSEND_FIXED_BUF */
#define OP_READ_FIXED	     4
#define OP_WRITE_FIXED	     5
#define OP_READV_FIXED	     60
#define OP_WRITEV_FIXED	     61
#define OP_SEND_ZC	     47
#define OP_SENDMSG_ZC	     48
#define OP_RECVMSG	     10
#define OP_SEND		     26
#define OP_RECV		     27
#define OP_READ_MULTISHOT    49

/* Completions without a request (multishot, zero-copy notifications) name it by these. */
struct uring_key {
	u64 ctx;
	u64 user_data;
};

struct uring_note {
	u64 request;	    /* a multishot request that goes on */
	u64 zerocopy_bytes; /* sent, and a notification is awaited */
	struct key key;
};
BPF_TABLE("lru_hash", struct uring_key, struct uring_note, uring_notes, 4096);

#define URING_WALK     0
#define URING_CONTENTS 1
BPF_PROG_ARRAY(uring_programs, 2);

static __always_inline u64 submitter(u64 request)
{
	u64 task = read64(request + KIOCB_TASK);

	return KIOCB_TASK_IS_TCTX ? read64(task + TCTX_TASK) : task;
}

/* splice and tee keep their input as a descriptor of the submitter, or of the ring: unknown. */
static __always_inline u64 splice_source(u64 request, u64 task)
{
	if (read32(request + IO_SPLICE_FLAGS) & SPLICE_F_FD_IN_FIXED)
		return 0;
	return file_of(task, read32(request + IO_SPLICE_FD_IN));
}

#if HAVE_REGISTERED
/*
 * The entry in the ring's table of buffers that a request names, 0 for none. Requests of reading
 * and writing keep it; those of zero-copy sends leave it to their notification, which may be gone:
 * the table still has it.
 */
static __always_inline u64 buffer_node(u64 request, u32 opcode)
{
	u64 table = read64(request + KIOCB_CTX) + RING_BUFFERS;
	u32 index = read16(request + KIOCB_BUF_INDEX);

	if (opcode != OP_SEND && opcode != OP_RECV && opcode != OP_SEND_ZC &&
	    opcode != OP_SENDMSG_ZC)
		return read64(request + KIOCB_BUF_NODE);
	return index < (u32)read32(table + TABLE_NR)
		       ? read64(read64(table + TABLE_NODES) + index * 8)
		       : 0;
}

static __always_inline bool names_buffer(u64 request, u32 opcode)
{
	if (opcode == OP_SEND || opcode == OP_RECV || opcode == OP_SEND_ZC ||
	    opcode == OP_SENDMSG_ZC)
		return read16(request + IO_SEND_FLAGS) & FIXED_BUF;
	return opcode == OP_READ_FIXED || opcode == OP_WRITE_FIXED || opcode == OP_READV_FIXED ||
	       opcode == OP_WRITEV_FIXED;
}
#endif

/*
 * The end that a request's buffer is: memory of the kernel where such is in the ring's table, by
 * whose it is (io_buffer_register_bvec(), io_uring/rsrc.c, 6.15), else the caller's own.
 */
static __always_inline u64 memory_end(u64 request, u32 opcode)
{
#if HAVE_REGISTERED
	u64 node, buffer;

	if (!names_buffer(request, opcode))
		return END_USER;
	node = buffer_node(request, opcode);
	if (!node)
		return END_UNKNOWN;
	buffer = read64(node + RSRC_NODE_BUF);
	if (read8(buffer + BUFFER_IS_KERNELS) & 1)
		return END_REGISTERED(read64(buffer + BUFFER_RELEASE));
#endif
	return END_USER;
}

static __always_inline void ends_of_request(u64 request, u32 opcode, u32 shape, u64 task,
					    struct call *call)
{
	u64 file = read64(request + KIOCB_FILE), source = USER_MEMORY, destination = USER_MEMORY;

	if (shape == SHAPE_READ || shape == SHAPE_RECVFROM || shape == SHAPE_RECVMSG)
		source = file;
	else
		destination = file;
	if (shape == SHAPE_SPLICE || shape == SHAPE_TEE)
		source = splice_source(request, task);
	fill_ends(call, source, destination);
	forget();
	if (call->destination.id == END_USER)
		call->destination.id = memory_end(request, opcode);
	else if (call->source.id == END_USER)
		call->source.id = memory_end(request, opcode);
	/* send_zc does not ask for SO_ZEROCOPY. */
	if (opcode == OP_SEND_ZC || opcode == OP_SENDMSG_ZC)
		call->flags = zerocopy_flags(sk_of(file));
}

#if FINDINGS
#define REQ_F_FIXED_FILE 1
BPF_PROG_ARRAY(uring_submit_programs, 2); /* as enter_programs */

/* Looks at the pipe that a request takes buffers from. */
static __always_inline void judge_request(u64 *ctx, u64 request, u64 entry)
{
	u64 task = bpf_get_current_task(), file = 0;
	u32 shape = entry & 0xff, zero = 0;
	struct inspection *inspection = inspection_at(AT_SUBMIT);

	if (!inspection)
		return;
	if (shape == SHAPE_SPLICE)
		file = splice_source(request, task);
	else if (shape == SHAPE_READ && !(read32(request + KIOCB_FLAGS) & REQ_F_FIXED_FILE))
		file = file_of(task, read32(request + KIOCB_FD));
	if (!look_into(inspection, current_process(), entry >> 8, file))
		return;
	if (shape == SHAPE_SPLICE) {
		inspection->bytes = read64(request + IO_SPLICE_LEN);
		inspection->destination = file_of(task, read32(request + KIOCB_FD));
		if (read32(request + KIOCB_FLAGS) & REQ_F_FIXED_FILE)
			inspection->destination = 0;
	}
#if CONTENTS
	uring_submit_programs.call(ctx, PROGRAM_COMPARE);
#endif
	uring_submit_programs.call(ctx, PROGRAM_BUFFERS);
}

int tp_uring_buffers(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_SUBMIT);

	if (inspection && !judge_some(inspection))
		uring_submit_programs.call(ctx, PROGRAM_BUFFERS);
	return 0;
}
#endif

int tp_io_uring_submit_req(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0);
	u32 opcode = read8(request + KIOCB_OPCODE);
	struct uring_note note = {.request = request};
	struct uring_key key;
	u64 *entry;

	entry = uring_table.lookup(&opcode);
	/* What a command brings, if anything, is told when it is complete. */
	if (!entry || !*entry || (*entry & 0xff) == SHAPE_COMMAND || !current_process())
		return 0;
	if (read32(request + KIOCB_FLAGS) & REQ_F_CQE_SKIP)
		count_lost(LOST_CQE_SKIPPED);
	if (opcode == OP_RECV || opcode == OP_RECVMSG || opcode == OP_READ_MULTISHOT) {
		key.ctx = read64(request + KIOCB_CTX);
		key.user_data = read64(request + KIOCB_USER_DATA);
		uring_notes.update(&key, &note);
	}
#if FINDINGS
	judge_request(ctx, request, *entry);
#endif
	return 0;
}

#if CONTENTS
int tp_uring_compare(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_SUBMIT);

	if (inspection)
		uring_submit_programs.call(ctx, compare_some(inspection, AT_SUBMIT)
							? PROGRAM_BUFFERS
							: PROGRAM_COMPARE);
	return 0;
}

/* Keeps the contents of what the request has queued. */
int tp_uring_contents(u64 *ctx)
{
	u32 zero = 0;
	struct inspection *inspection = inspection_at(AT_COMPLETE);

	if (inspection)
		uring_programs.call(ctx, keep_some(inspection, AT_COMPLETE) ? URING_WALK
									    : URING_CONTENTS);
	return 0;
}
#endif

#if HAVE_IDENTITY && IDENTITY
int tp_uring_walk(u64 *ctx)
{
	finish_walk(AT_COMPLETE);
	return 0;
}
#endif

/* A zero-copy send's notification: the kernel's own word on what became of it. */
static __always_inline void count_notification(struct uring_key *where, u32 usage)
{
	struct uring_note *note = uring_notes.lookup(where);

	if (!note || !note->zerocopy_bytes)
		return;
	declare(&note->key, note->zerocopy_bytes, usage & NOTIF_COPIED);
	uring_notes.delete(where);
}

int tp_io_uring_complete(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 1), *entry, task, process;
	struct call *call;
	struct uring_note *found;
	struct uring_key where;
	struct tally *tally;
	u32 opcode, shape, flags, tgid;
	struct key key;
	s32 result;

	where.ctx = tracepoint_arg(ctx, 0);
#if URING_COMPLETE_HAS_CQE
	{
		u64 cqe = tracepoint_arg(ctx, 2);

		where.user_data = read64(cqe);
		result = read32(cqe + 8);
		flags = read32(cqe + 12);
	}
#else
	where.user_data = tracepoint_arg(ctx, 2);
	result = tracepoint_arg(ctx, 3);
	flags = tracepoint_arg(ctx, 4);
#endif
	if (flags & CQE_F_NOTIF) {
		count_notification(&where, result);
		return 0;
	}
	if (result < 0) {
#if MEASURED
		drop_request_copies(request);
#endif
		return 0;
	}
	if (!request) {
		found = uring_notes.lookup(&where);
		if (!found || !found->request)
			return 0;
		request = found->request;
	}
	opcode = read8(request + KIOCB_OPCODE);
	entry = uring_table.lookup(&opcode);
	if (!entry || !*entry || !result != ((*entry & 0xff) == SHAPE_COMMAND))
		return 0;
	task = submitter(request);
	tgid = read32(task + TASK_TGID);
	process = process_of(tgid, task);
	call = call_at(AT_COMPLETE);
	if (!process || !call)
		return 0;
	call->process = process;
	call->flags = 0;
	shape = *entry & 0xff;
	call->via = *entry >> 8;
	if (shape == SHAPE_COMMAND) {
#if HAVE_FUSE_RING
		fill_end(&call->source, read64(request + KIOCB_FILE));
		forget();
		if (call->source.id == END_FUSE_DEVICE)
			count_ring_request(call, request, task);
#endif
		return 0;
	}
	call->bytes = result;
	ends_of_request(request, opcode, shape, task, call);
	forget();
	fill_key(&key, call, task);
	tally = tally_of(&key, &call->place);
	if (!tally)
		return 0;
	tally->operations++;
	tally->bytes += call->bytes;
#if MEASURED
	take_request_copies(&key, request, call->bytes);
#endif
	if ((opcode == OP_SEND_ZC || opcode == OP_SENDMSG_ZC) && flags & CQE_F_MORE &&
	    read16(request + IO_SEND_FLAGS) & REPORT_USAGE) {
		struct uring_note note = {.zerocopy_bytes = call->bytes, .key = key};

		uring_notes.update(&where, &note);
	}
	if (END_IS_SOCKET(call->source.id) && END_IS_MEMORY(call->destination.id))
		take_copied(call, tally);
#if HAVE_IDENTITY && IDENTITY
	{
		struct walk *walk = new_walk(AT_COMPLETE, call->bytes);

		if (!walk || (shape != SHAPE_SPLICE && shape != SHAPE_TEE) ||
		    !END_IS_PIPE(call->destination.id))
			return 0;
		note_lent(call);
		if (END_IS_PIPE(call->source.id))
			prepare_pipes(walk, call, shape == SHAPE_TEE);
		else if (END_IS_FILESYSTEM(call->source.id))
			prepare_into_pipe(walk, call);
		else
			return 0;
#if CONTENTS
		if (prepare_contents(call, AT_COMPLETE))
			uring_programs.call(ctx, URING_CONTENTS);
#endif
		uring_programs.call(ctx, URING_WALK);
	}
#endif
	return 0;
}
#endif
