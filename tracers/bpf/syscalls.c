// SPDX-License-Identifier: GPL-2.0-only
/*
 * System calls, counted when they return: pt_regs still holds the arguments, and rings and page
 * caches still show the pages. Counting takes no probe at entry; findings do (findings.c).
 */
#define TS_COMPAT 2 /* arch/x86/include/asm/thread_info.h */
#define X32_BIT	  0x40000000

#define MSG_PEEK	0x2
#define MSG_TRUNC	0x20
#define MSG_ERRQUEUE	0x2000
#define MSG_ZEROCOPY	0x4000000
#define SPLICE_F_MOVE	1
#define SPLICE_F_GIFT	8
#define FICLONE		0x40049409
#define FICLONERANGE	0x4020940d
#define AF_INET		2
#define IPPROTO_TCP	6
#define NETIF_F_SG	1
#define IFF_LOOPBACK	8
#define AF_INET6	10
#define FUSE_OUT_HEADER 16 /* struct fuse_out_header: protocol, not payload */
#define FS_REQUIRES_DEV 1
/* A prime: programs call in rounds, and a sample must not always meet the same call of them. */
#define SAMPLE_EVERY 17

struct user_msghdr {
	u64 name;
	u32 namelen;
	u32 pad;
	u64 iov;
	u64 iovlen;
	u64 control;
	u64 controllen;
	u32 flags;
	u32 pad2;
};

static __always_inline u64 sk_of(u64 file)
{
	return read64(read64(file + FILE_PRIVATE) + SOCKET_SK);
}

/*
 * Flags of a zero-copy send. It copies after all on a TCP route that cannot gather fragments, and
 * where loopback hands packets to a local socket: skb_orphan_frags_rx().
 */
static __always_inline u32 zerocopy_flags(u64 sk)
{
#if HAVE_ZEROCOPY
	u64 device = read64(read64(sk + SOCK_DST) + DST_DEV);
	bool gathers = read64(sk + SOCK_ROUTE_CAPS) & NETIF_F_SG;

	if (read16(sk + SOCK_PROTOCOL) == IPPROTO_TCP && !gathers)
		return 0;
	return F_ZEROCOPY | (read32(device + NETDEV_FLAGS) & IFF_LOOPBACK ? F_LOOPBACK : 0);
#else
	return 0;
#endif
}

/* MSG_ZEROCOPY is honoured on sockets with SO_ZEROCOPY only. */
static __always_inline bool wants_zerocopy(u64 sk, u32 flags)
{
#if HAVE_ZEROCOPY
	return flags & MSG_ZEROCOPY && read64(sk + SOCK_FLAGS) & 1ULL << SOCK_ZEROCOPY_BIT;
#else
	return false;
#endif
}

/* Room in a msghdr's buffers, in bytes; without bound where there are more than can be read. */
#define MAX_IOVECS 8
static __always_inline u64 room_of(u64 address)
{
	struct user_msghdr msg = {};
	struct {
		u64 base, length;
	} vector[MAX_IOVECS] = {};
	u64 room = 0;
	u32 i;

	read_user(&msg, sizeof(msg), (void *)address);
	if (msg.iovlen > MAX_IOVECS)
		return ~0ULL;
	read_user(vector, sizeof(vector[0]) * (msg.iovlen & (2 * MAX_IOVECS - 1)), (void *)msg.iov);
#pragma unroll
	for (i = 0; i < MAX_IOVECS; i++)
		room += vector[i].length;
	return room;
}

/*
 * Programs that others end in: a tail call returns only where it fails. They keep what the
 * verifier has to walk through apart from what every call runs through.
 */
#define PROGRAM_EXIT	     0
#define PROGRAM_MESSAGES     1
#define PROGRAM_WALK	     2
#define PROGRAM_NOTIFICATION 3
#define PROGRAM_REPLY_END    4
#define PROGRAM_CONTENTS     5
BPF_PROG_ARRAY(exit_programs, 6);
#define MESSAGES_COUNTED (1ULL << 63)

/* sendmmsg and recvmmsg return messages: adds up msg_len of each struct mmsghdr (64 bytes). */
int tp_messages(u64 *ctx)
{
	u64 regs = tracepoint_arg(ctx, 0), vector = read64(regs + REGS_ARG1), total = 0, failed = 0;
	u32 i;
	struct call *call = call_at(AT_EXIT);
	u64 count;

	if (!call)
		return 0;
	count = call->bytes;
#pragma clang loop unroll(disable)
	for (i = 0; i < 1024; i++) { /* UIO_MAXIOV */
		u32 length = 0;

		if (i >= count)
			break;
		failed |= read_user(&length, 4, (void *)(vector + i * 64 + 56));
		total += length;
	}
	if (failed)
		count_lost(LOST_MESSAGES);
	call->messages = total | MESSAGES_COUNTED;
	exit_programs.call(ctx, PROGRAM_EXIT);
	return 0;
}

#if HAVE_ZEROCOPY
/* recvmsg(MSG_ERRQUEUE): what the kernel tells the program of its zero-copy sends. */
int tp_notification(u64 *ctx)
{
	u64 regs = tracepoint_arg(ctx, 0);
	u64 file = file_of(bpf_get_current_task(), read64(regs + REGS_ARG0));
	struct user_msghdr msg = {};

	read_user(&msg, sizeof(msg), (void *)read64(regs + REGS_ARG1));
	take_notification(sk_of(file), msg.control);
	return 0;
}
#endif

/* FICLONE and FICLONERANGE return 0. The bytes they carry: the file's, or the range's. */
static __always_inline u64 cloned_bytes(struct call *call, u64 argument)
{
	u64 range[4] = {}; /* struct file_clone_range: src_fd, offset, length, dest_offset */
	u64 size = read64(call->source.inode + INODE_SIZE);

	if (call->via == VIA_IOCTL_FICLONE)
		return size;
	read_user(range, sizeof(range), (void *)argument);
	return range[2] ? range[2] : size - range[1];
}

/* The descriptor that a clone reads from. */
static __always_inline u32 cloned_fd(u32 command, u64 argument)
{
	u64 fd = argument;

	if (command == FICLONERANGE)
		read_user(&fd, sizeof(fd), (void *)argument);
	return fd;
}

#if HAVE_IDENTITY && IDENTITY

/* What follows from a walk. */
enum verdict {
	NO_WALK,
	INTO_PIPE,	/* the newest buffers are the source's pages: shared */
	INTO_PIPE_USER, /* the newest buffers are pages of user memory: shared */
	BETWEEN_PIPES,	/* both rings show the page: moved, but a split buffer is shared */
	TEED,		/* both rings show the page: shared */
	INTO_FILE,	/* no page of the pipe is in the file's page cache: copied */
	INTERNAL,	/* the pipe within sendfile shows the source's pages: shared, first leg */
};

/* Splices into a pipe, and sendfile to one: are the newest buffers the source's own pages? */
static __always_inline void prepare_into_pipe(struct walk *walk, struct call *call)
{
	bool cached = END_IS_FILESYSTEM(call->source.id) && !call->source.direct;
	u32 slots = (call->bytes + 4095) >> 12;

	walk->verdict = INTO_PIPE;
	walk->judge = JUDGE_MAPPING;
	walk->mapping = read64(call->source.file + FILE_MAPPING);
	walk_newest(walk, pipe_of(call->destination.file));
	if (cached)
		slots = pages_spanned(end_of_slot(slot_at(walk->bufs, walk->start, walk->mask)),
				      call->bytes);
	walk->slots = slots < walk->slots ? slots : walk->slots;
}

static __always_inline void prepare_user_pages(struct walk *walk, struct call *call)
{
	walk->verdict = INTO_PIPE_USER;
	walk->judge = JUDGE_MAPPED;
	walk_newest(walk, pipe_of(call->destination.file));
}

/* splice and tee from pipe to pipe: do both rings hold the same pages? */
static __always_inline void prepare_pipes(struct walk *walk, struct call *call, bool tee)
{
	u64 in = pipe_of(call->source.file), last, total = 0;
	u32 tail = pipe_index(in + PIPE_TAIL), i;

	walk->verdict = tee ? TEED : BETWEEN_PIPES;
	walk->judge = JUDGE_RING;
	walk_newest(walk, pipe_of(call->destination.file));
	walk->other_mask = read32(in + PIPE_RING_SIZE) - 1;
	walk->other_bufs = read64(in + PIPE_BUFS);
	walk->other_start = tail - 1;
	if (tee) {
#pragma clang loop unroll(disable)
		for (i = 0; i < MAX_SLOTS && total < call->bytes; i++) {
			total += (u32)read32(slot_at(walk->other_bufs, tail + i, walk->other_mask) +
					     BUF_LEN);
			walk->other_start++;
		}
		return;
	}
	/* Only the last buffer can have been split: then it stays in both rings. */
	last = slot_at(walk->bufs, walk->start, walk->mask);
	if (tail != pipe_index(in + PIPE_HEAD) &&
	    read64(slot_at(walk->other_bufs, tail, walk->other_mask) + BUF_PAGE) ==
		    read64(last + BUF_PAGE)) {
		walk->other_start = tail;
		walk->partial = (u32)read32(last + BUF_LEN);
	}
}

/* The pages that a pipe last gave away still stand in its slots. */
static __always_inline void prepare_into_file(struct walk *walk, struct call *call)
{
	u64 pipe = pipe_of(call->source.file);
	u32 slots = (call->bytes + 4095) >> 12;

	walk->verdict = INTO_FILE;
	walk->judge = JUDGE_FOREIGN;
	walk->mapping = read64(call->destination.file + FILE_MAPPING);
	walk_newest(walk, pipe);
	walk->start = pipe_index(pipe + PIPE_TAIL) - 1;
	walk->slots = slots < walk->slots ? slots : walk->slots;
	walk->bytes = ~0ULL;
}

/*
 * sendfile and copy_file_range go through a pipe of the task's own, which is empty again but
 * still shows the pages of its last round: at most a ring of them.
 */
static __always_inline void prepare_internal(struct walk *walk, struct call *call, u64 task,
					     u64 position)
{
	u64 pipe = read64(task + TASK_SPLICE_PIPE);
	u32 slots = pages_spanned(position, call->bytes);

	if (!pipe || call->source.direct)
		return;
	walk->verdict = INTERNAL;
	walk->judge = JUDGE_MAPPING;
	walk->mapping = read64(call->source.file + FILE_MAPPING);
	walk_newest(walk, pipe);
	walk->start = 0;
	walk->step = 1;
	if (slots <= walk->slots)
		walk->slots = slots;
	else
		walk->proven = (u64)(walk->slots - 1) << 12;
	walk->bytes = ~0ULL;
}

#if FINDINGS
/*
 * SPLICE_F_MOVE into a file that never takes pages: iter_file_splice_write() (fs/splice.c) copies,
 * since 2.6.23 (the flag has meant nothing here since). One occurrence is one call.
 */
static __always_inline void record_never(struct walk *walk, struct call *call)
{
	struct finding_key key = {.process = call->process,
				  .source = call->source.id,
				  .destination = call->destination.id,
				  .name = STEAL_REFUSED,
				  .reason = NEVER_MOVES,
				  .via = call->via};
	struct facts facts = {.class = NR_CLASSES, .mapcount = -1};

	/* Its page has been given back: what is seen of it now is not what was spliced. */
	facts.page = read64(slot_at(walk->bufs, walk->start, walk->mask) + BUF_PAGE);
	record(&key, &facts, call->destination.inode);
}
#endif

static __always_inline void apply(struct walk *walk, struct call *call, struct tally *tally)
{
	u64 same = walk->same < call->bytes ? walk->same : call->bytes;

	switch (walk->verdict) {
	case INTO_PIPE:
		if (all_same(walk))
			same = call->bytes;
		tally->identity[0][SHARED] += same;
		/* Whether DMA or the CPU filled a fresh page is for the rules to say. */
		if (!call->source.direct)
			clamp_add(&tally->identity[0][COPIED], walk->fresh, call->bytes - same);
		/* fall through */
	case INTERNAL:
		if (walk->verdict == INTERNAL && all_same(walk))
			tally->identity[0][SHARED] += walk->proven;
		tally->queued_mapped += walk->nr_mapped;
		break;
	case INTO_PIPE_USER:
		tally->identity[0][SHARED] += all_same(walk) ? call->bytes : same;
		tally->queued_mapped += walk->nr_mapped;
		break;
	case TEED:
		tally->identity[0][SHARED] += same;
		break;
	case BETWEEN_PIPES:
		if (same < walk->partial)
			break;
		tally->identity[0][SHARED] += walk->partial;
		tally->identity[0][MOVED] += same - walk->partial;
		break;
	case INTO_FILE:
		if (!all_same(walk))
			break;
		tally->identity[0][COPIED] += call->bytes;
#if FINDINGS
		if (call->flags & F_MOVE)
			record_never(walk, call);
#endif
		break;
	}
}

#if HAVE_EXTENTS
/*
 * copy_file_range between files of one disk filesystem: what was copied is in the destination's
 * page cache (dirty, so it cannot have been evicted), what was remapped is in no page cache
 * (generic_remap_file_range_prep() and the filesystems drop it). DAX files have no page cache.
 */
static __always_inline bool judge_extents(struct call *call, struct tally *tally, u64 in_end,
					  u64 out_end)
{
	u64 out, in;

	if (!END_IS_FILESYSTEM(call->destination.id) || call->destination.direct ||
	    call->source.direct || call->source.dax || call->destination.dax ||
	    call->source.id != call->destination.id ||
	    !(read32((call->destination.id & ~1ULL) + FSTYPE_FLAGS) & FS_REQUIRES_DEV))
		return false;
	out = cached_page(read64(call->destination.file + FILE_MAPPING), (out_end - 1) >> 12);
	if (!out) {
		tally->identity[0][REMAPPED] += call->bytes;
		tally->identity[1][REMAPPED] += call->bytes;
		return true;
	}
	in = cached_page(read64(call->source.file + FILE_MAPPING), (in_end - 1) >> 12);
	if (in && in != out)
		tally->identity[1][COPIED] += call->bytes;
	return false;
}
#endif

/* Where a file stands after the call: the caller's offset, or the file's own. */
static __always_inline u64 position_after(u64 offset, u64 file)
{
	u64 position = 0;

	if (offset)
		read_user(&position, 8, (void *)offset);
	else
		position = read64(file + FILE_POS);
	return position;
}

/* The page cache that the pages which a pipe gave away last belong to. */
static __always_inline u64 last_given_mapping(struct walk *walk, u64 file)
{
	u64 pipe = pipe_of(file);
	u32 mask = read32(pipe + PIPE_RING_SIZE) - 1;
	u64 slot = slot_at(read64(pipe + PIPE_BUFS), pipe_index(pipe + PIPE_TAIL) - 1, mask);

	load_folio(&walk->folio, read64(slot + BUF_PAGE));
	return walk->folio.mapping;
}

/* Are pages compared? Those that sockets give, and that devices take from a pipe, are not. */
static __always_inline bool is_compared(struct call *call, u32 shape)
{
	u64 source = call->source.id, destination = call->destination.id;

	if (shape == SHAPE_VMSPLICE)
		return END_IS_PIPE(destination);
	if (END_IS_PIPE(source))
		return END_IS_PIPE(destination) || END_IS_SOCKET(destination) ||
		       END_IS_FILESYSTEM(destination);
	return !END_IS_SOCKET(source);
}

/* Which walk tells what became of this call's bytes, if any does. */
static __always_inline void prepare(struct walk *walk, u64 task, u64 regs, u32 shape,
				    struct call *call, struct key *key, struct tally *tally)
{
	u64 in_offset = read64(regs + REGS_ARG1), out_offset = read64(regs + REGS_ARG3);
	bool to_pipe = END_IS_PIPE(call->destination.id), from_pipe = END_IS_PIPE(call->source.id);
	bool to_socket = END_IS_SOCKET(call->destination.id);
	u64 position, family = call->destination.id >> 40 & 0xffff;

	if (shape == SHAPE_VMSPLICE) {
		prepare_user_pages(walk, call);
		return;
	}
	if (from_pipe) {
		if (to_pipe)
			prepare_pipes(walk, call, shape == SHAPE_TEE);
		else if (!to_socket && !call->destination.direct)
			prepare_into_file(walk, call);
#if HAVE_NETWORK
		else if (to_socket) {
			u64 mapping = last_given_mapping(walk, call->source.file);

			if (mapping && !(mapping & MAPPING_FLAGS))
				expect_sent(key, sk_of(call->destination.file), mapping,
					    call->bytes, 1);
		}
#endif
		return;
	}
	if (to_pipe && (shape != SHAPE_SENDFILE || SENDFILE_INTO_PIPE)) {
		prepare_into_pipe(walk, call);
		return;
	}
#if HAVE_NETWORK
	if (to_socket && (family == AF_INET || family == AF_INET6)) {
		expect_sent(key, sk_of(call->destination.file),
			    read64(call->source.file + FILE_MAPPING), call->bytes, 3);
		return;
	}
#endif
	position = position_after(shape == SHAPE_SENDFILE ? read64(regs + REGS_ARG2) : in_offset,
				  call->source.file);
#if HAVE_EXTENTS
	if (shape == SHAPE_COPY_FILE_RANGE &&
	    judge_extents(call, tally, position,
			  position_after(out_offset, call->destination.file)))
		return;
#endif
	prepare_internal(walk, call, task, position);
}

#if CONTENTS
/* The pipe that the call has queued buffers in, for tp_contents. False if there is none. */
static __always_inline bool prepare_contents(struct call *call, u32 place)
{
	struct inspection *inspection = inspection_at(place);

	if (!inspection || !END_IS_PIPE(call->destination.id))
		return false;
	inspect_pipe(inspection, pipe_of(call->destination.file));
	inspection->destination = call->destination.inode;
	inspection->bytes = call->bytes;
	inspection->next = inspection->total = 0;
	return true;
}
#endif

/* Hands over to tp_walk, or returns where there is nothing to see. */
static __always_inline void judge(u64 *ctx, u64 task, u64 regs, u32 shape, struct call *call,
				  struct key *key, struct tally *tally)
{
	struct walk *walk;

	if (!is_compared(call, shape))
		return;
	walk = new_walk(AT_EXIT, call->bytes);
	if (!walk)
		return;
	note_lent(call);
#if FINDINGS
	note_loan(call);
#endif
	prepare(walk, task, regs, shape, call, key, tally);
	if (walk->verdict == NO_WALK)
		return;
#if CONTENTS
	if (prepare_contents(call, AT_EXIT))
		exit_programs.call(ctx, PROGRAM_CONTENTS);
#endif
	exit_programs.call(ctx, PROGRAM_WALK);
}

/* Walks the ring that a program before it prepared. */
static __always_inline void finish_walk(u32 place)
{
	struct walk *walk = walks.lookup(&place);
	struct call *call = call_at(place);
	struct tally *tally;

	if (!walk || !call)
		return;
	tally = tally_at(call->place);
	if (!tally)
		return;
	walk_ring(walk);
	apply(walk, call, tally);
}

int tp_walk(u64 *ctx)
{
	finish_walk(AT_EXIT);
	return 0;
}
#endif /* HAVE_IDENTITY && IDENTITY */

/* What skb_copy_datagram_iter counted during this call. */
static __always_inline void take_copied(struct call *call, struct tally *tally)
{
	struct note *note = current_note();

	if (!note)
		return;
	tally->measured_copied += note->copied < call->bytes ? note->copied : call->bytes;
	note->copied = 0;
}

/* Which of a READ reply's pages changed while it was delivered (fuse.c). */
static __always_inline void take_fuse_moves(struct call *call, struct tally *tally)
{
	struct note *note = current_note();
	u64 moved;

	if (!note || !note->fuse_pages)
		return;
	moved = note->fuse_bytes < call->bytes ? note->fuse_bytes : call->bytes;
	tally->identity[0][MOVED] += moved;
	tally->identity[0][COPIED] += call->bytes - moved;
	note->fuse_bytes = note->fuse_pages = 0;
}

static __always_inline u32 receive_flags(u32 flags)
{
	return (flags & MSG_TRUNC ? F_TRUNC : 0) | (flags & MSG_PEEK ? F_PEEK : 0) |
	       (flags & MSG_ERRQUEUE ? F_ERRQUEUE : 0);
}

/* A 32-bit caller's arguments stand elsewhere, and mean other things: only bytes are counted. */
static __always_inline void count_compat(struct call *call, u32 entry, u64 regs)
{
	u64 which = read64(regs + REGS_BX);
	struct tally *tally;
	struct key key;

	call->via = entry >> 8 & 0xff;
	if (!entry || !call->bytes || call->via == VIA_IOCTL_FICLONE || call->via == VIA_CLOSE)
		return;
	/* SYS_SEND to SYS_RECVFROM, SYS_SENDMSG and SYS_RECVMSG (linux/net.h) */
	if (call->via == VIA_SOCKETCALL && !(which >= 9 && which <= 12) && which != 16 &&
	    which != 17)
		return;
	call->source.id = call->destination.id = END_UNKNOWN;
	call->source.file = call->destination.file = 0;
	call->flags = F_COMPAT;
	fill_key(&key, call, bpf_get_current_task());
	tally = tally_of(&key, &call->place);
	if (!tally)
		return;
	tally->operations++;
	tally->bytes += call->bytes;
#if MEASURED
	take_call_copies(&key, 0);
#endif
}

/* Finds the call's two ends and its flags. False if it carries nothing. */
static __always_inline bool choose_ends(struct call *call, u64 task, u64 regs, u32 shape)
{
	u64 files = files_of(task);
	u64 first = shape == SHAPE_USER_TO_USER ? 0 : file_in(files, read64(regs + REGS_ARG0));
	u64 source = USER_MEMORY, destination = USER_MEMORY;
	u32 message_flags;
	s32 second = -1;

	switch (shape) {
	case SHAPE_READ:
		source = first;
		break;
	case SHAPE_WRITE:
		destination = first;
		break;
	case SHAPE_SPLICE:
	case SHAPE_COPY_FILE_RANGE:
		source = first;
		second = read64(regs + REGS_ARG2);
		if (shape == SHAPE_SPLICE && read64(regs + REGS_ARG5) & SPLICE_F_MOVE)
			call->flags = F_MOVE;
		break;
	case SHAPE_TEE:
		source = first;
		second = read64(regs + REGS_ARG1);
		break;
	case SHAPE_SENDFILE:
		destination = first;
		second = read64(regs + REGS_ARG1);
		break;
	case SHAPE_VMSPLICE:
		if (read32(first + FILE_MODE) & FMODE_WRITE)
			destination = first;
		else
			source = first;
		if (read64(regs + REGS_ARG3) & SPLICE_F_GIFT)
			call->flags = F_GIFT;
		break;
	case SHAPE_RECVFROM:
	case SHAPE_RECVMSG:
	case SHAPE_RECVMMSG:
		source = first;
		message_flags = read64(regs + (shape == SHAPE_RECVMSG ? REGS_ARG2 : REGS_ARG3));
		call->flags = receive_flags(message_flags);
		break;
	case SHAPE_SENDTO:
	case SHAPE_SENDMSG:
	case SHAPE_SENDMMSG:
		destination = first;
		message_flags = read64(regs + (shape == SHAPE_SENDMSG ? REGS_ARG2 : REGS_ARG3));
		if (wants_zerocopy(sk_of(first), message_flags))
			call->flags = zerocopy_flags(sk_of(first));
		break;
	case SHAPE_IOCTL: {
		u32 command = read64(regs + REGS_ARG1);

		if ((command != FICLONE && command != FICLONERANGE) || call->bytes)
			return false;
		call->via = command == FICLONE ? VIA_IOCTL_FICLONE : VIA_IOCTL_FICLONERANGE;
		call->flags = F_REMAP;
		destination = first;
		second = cloned_fd(command, read64(regs + REGS_ARG2));
		break;
	}
	}
	if (second >= 0) {
		u64 file = file_in(files, second);

		if (shape == SHAPE_SENDFILE || shape == SHAPE_IOCTL)
			source = file;
		else
			destination = file;
	}
	fill_ends(call, source, destination);
	forget();
	if (shape == SHAPE_IOCTL)
		call->bytes = cloned_bytes(call, read64(regs + REGS_ARG2));
	if (call->destination.id == END_FUSE_DEVICE) {
		call->via = VIA_FUSE_REPLY;
		call->bytes = call->bytes > FUSE_OUT_HEADER ? call->bytes - FUSE_OUT_HEADER : 0;
	}
	return call->bytes;
}

/*
 * Received bytes: those that the kernel was seen to copy. With MSG_TRUNC a datagram's whole
 * length is returned, also what did not fit and was dropped.
 */
static __always_inline void take_received(struct call *call, struct tally *tally, u64 regs,
					  u32 shape)
{
	bool stream = (call->source.id >> 32 & 0xff) == 1 /* SOCK_STREAM */;
	u64 room;

	if (call->flags & F_TRUNC && !stream && shape != SHAPE_RECVMMSG) {
		room = shape == SHAPE_RECVFROM ? read64(regs + REGS_ARG2)
					       : room_of(read64(regs + REGS_ARG1));
		if (call->bytes > room) {
			tally->identity[0][DISCARDED] += call->bytes - room;
			call->bytes = room;
		}
	}
	take_copied(call, tally);
}

#if !HAVE_IO_URING
#define NR_IO_URING_SETUP   425
#define NR_IO_URING_ENTER   426
#define IORING_SETUP_SQPOLL 2

/*
 * Nobody sees what became of an io_uring's requests: io_uring_enter(2) returns how many it took.
 * A ring whose kernel thread takes them counts as one, for they may need no call.
 */
static __always_inline void count_requests(u64 nr, s64 ret, u64 regs)
{
	u32 flags = 0, flags_at = 8; /* struct io_uring_params */
	u64 events = ret;

	if (nr == NR_IO_URING_SETUP) {
		read_user(&flags, sizeof(flags), (void *)(read64(regs + REGS_ARG1) + flags_at));
		events = ret >= 0 && flags & IORING_SETUP_SQPOLL;
	} else if (nr != NR_IO_URING_ENTER || ret < 0) {
		return;
	}
	if (events && current_process())
		count_many_lost(LOST_REQUESTS, events);
}
#endif

int tp_sys_exit(u64 *ctx)
{
	u64 regs = tracepoint_arg(ctx, 0), nr = read64(regs + REGS_NR), task, process, messages;
	u32 index = nr & (TABLE_SIZE - 1), entry, shape;
	s64 ret = tracepoint_arg(ctx, 1);
	struct tally *tally;
	struct call *call;
	struct key key;
	u64 *entries;

#if MEASURED
	/* Whatever the call is; but once, where tp_messages comes back. */
	call = call_at(AT_EXIT);
	if (call && !call->messages)
		end_copies(current_process());
#endif
#if !HAVE_IO_URING
	count_requests(nr, ret, regs);
#endif
	entries = call_table.lookup(&index);
	if (!entries || !*entries || ret < 0)
		return 0;
	task = bpf_get_current_task();
	process = process_of_task(task);
	if (!process)
		return 0;
	call = call_at(AT_EXIT);
	if (!call)
		return 0;
	call->process = process;
	call->flags = 0;
	call->bytes = ret;
	if (read32(task + TASK_STATUS) & TS_COMPAT || nr & X32_BIT) {
		count_compat(call, nr & X32_BIT ? *entries : *entries >> 32, regs);
		return 0;
	}
	entry = *entries;
	shape = entry & 0xff;
	call->via = entry >> 8 & 0xff;
#if HAVE_ZEROCOPY
	if (!ret && shape == SHAPE_RECVMSG && read64(regs + REGS_ARG2) & MSG_ERRQUEUE)
		exit_programs.call(ctx, PROGRAM_NOTIFICATION);
#endif
	if (!entry || shape == SHAPE_CLOSE || (!ret && shape != SHAPE_IOCTL))
		return 0;

	messages = call->messages;
	call->messages = 0;
	if (entry & MANY_MESSAGES) {
		if (!messages) {
			exit_programs.call(ctx, PROGRAM_MESSAGES);
			count_lost(LOST_MESSAGES);
			return 0;
		}
		call->bytes = messages & ~MESSAGES_COUNTED;
	}
	if (!choose_ends(call, task, regs, shape))
		return 0;

	fill_key(&key, call, task);
	tally = tally_of(&key, &call->place);
	if (!tally)
		return 0;
	tally->operations++;
	tally->bytes += call->bytes;
#if MEASURED
	take_call_copies(&key, call->via == VIA_FUSE_REPLY ? FUSE_OUT_HEADER : 0);
#endif

#if HAVE_ZEROCOPY
	if (call->flags & F_ZEROCOPY)
		await_notification(&key, sk_of(call->destination.file), call->bytes);
#endif
	if (call->via == VIA_FUSE_REPLY) {
		take_fuse_moves(call, tally);
#if MEASURED && FINDINGS && !FUSE_EVENTS
		end_theft(process);
#endif
#if FINDINGS && HAVE_FUSE && FUSE_EVENTS
		exit_programs.call(ctx, PROGRAM_REPLY_END);
#endif
		return 0;
	}
	if (END_IS_SOCKET(call->source.id) && call->destination.id == END_USER) {
		take_received(call, tally, regs, shape);
		return 0;
	}
#if HAVE_IDENTITY && IDENTITY
	if (shape < SHAPE_SPLICE || shape > SHAPE_COPY_FILE_RANGE)
		return 0;
	if (IDENTITY == 1 && call->nr_judged++ % SAMPLE_EVERY)
		return 0;
	judge(ctx, task, regs, shape, call, &key, tally);
#endif
	return 0;
}
