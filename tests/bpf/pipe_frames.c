// SPDX-License-Identifier: GPL-2.0-only
/*
 * The pages that lie in a pipe when its bytes are spliced into a FUSE reply, by the request that is
 * answered: tests/support/pipe_frames.py reads them. Nothing of the audit's own probes but
 * access.h.
 */
#define SYS_SPLICE     275 /* arch/x86/entry/syscalls/syscall_64.tbl */
#define FUSE_READ      15  /* include/uapi/linux/fuse.h */
#define READ_IN_OFFSET 8
#define READ_IN_SIZE   16
#define S_IFMT	       0170000
#define S_IFIFO	       0010000

struct queued {
	u64 offset;		/* of the READ in its file, bytes */
	u64 size;		/* that it asked for, bytes */
	u64 nr;			/* buffers in the pipe */
	u64 pages[MAX_BUFFERS]; /* the address of each one's struct page */
	u32 lengths[MAX_BUFFERS];
	u32 offsets[MAX_BUFFERS];
};

BPF_HASH(watched, u32, u32, 16); /* processes */
BPF_TABLE("percpu_array", u32, struct queued, scratch, 1);
BPF_HASH(spliced, u32, struct queued, 64); /* thread -> what its last splice(2) found in a pipe */
BPF_HASH(answered, u64, struct queued, MAX_ANSWERS);
BPF_ARRAY(lost, u64, 1);

static __always_inline u64 pipe_behind(u32 fd)
{
	u64 task = bpf_get_current_task();
	u64 table = read64(read64(task + TASK_FILES) + FILES_FDT);
	u64 file, inode;

	if (fd >= (u32)read32(table + FDT_MAX))
		return 0;
	file = read64(read64(table + FDT_FD) + (u64)fd * 8);
	inode = read64(file + FILE_INODE);
	return (read16(inode + INODE_MODE) & S_IFMT) == S_IFIFO ? read64(file + FILE_PRIVATE) : 0;
}

static __always_inline u32 pipe_position(u64 address)
{
	return PIPE_HEAD_SIZE == 2 ? read16(address) : read32(address);
}

int tp_sys_enter(u64 *ctx)
{
	u64 id = bpf_get_current_pid_tgid(), regs = tracepoint_arg(ctx, 0), pipe, bufs;
	u32 process = id >> 32, thread = id, zero = 0, tail, mask, nr, i;
	struct queued *queued = scratch.lookup(&zero);

	if (tracepoint_arg(ctx, 1) != SYS_SPLICE || !watched.lookup(&process) || !queued)
		return 0;
	pipe = pipe_behind(read64(regs + REGS_ARG0));
	if (!pipe)
		return 0;
	tail = pipe_position(pipe + PIPE_TAIL);
	nr = PIPE_HEAD_SIZE == 2 ? (u16)(pipe_position(pipe + PIPE_HEAD) - tail)
				 : pipe_position(pipe + PIPE_HEAD) - tail;
	mask = (u32)read32(pipe + PIPE_RING_SIZE) - 1;
	bufs = read64(pipe + PIPE_BUFS);
	queued->nr = nr;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_BUFFERS; i++) {
		u64 slot = bufs + (u64)((tail + i) & mask) * BUF_SIZE;

		if (i >= nr)
			break;
		queued->pages[i] = read64(slot + BUF_PAGE);
		queued->lengths[i] = read32(slot + BUF_LEN);
		queued->offsets[i] = read32(slot + BUF_OFFSET);
	}
	spliced.update(&thread, queued);
	return 0;
}

/* In the time of the thread that answers, within its splice(2) or write(2). */
int tp_fuse_request_end(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0), arguments, unique, one = 1, *count;
	u64 id = bpf_get_current_pid_tgid();
	u32 process = id >> 32, thread = id, zero = 0;
	struct queued *queued;

	if (!watched.lookup(&process) || (u32)read32(request + FUSE_REQ_OPCODE) != FUSE_READ)
		return 0;
	queued = spliced.lookup(&thread);
	if (!queued)
		return 0;
	arguments = read64(read64(request + FUSE_REQ_ARGS) + FUSE_ARGS_IN_VALUE);
	queued->offset = read64(arguments + READ_IN_OFFSET);
	queued->size = read32(arguments + READ_IN_SIZE);
	unique = read64(request + FUSE_REQ_UNIQUE);
	if (answered.update(&unique, queued)) {
		count = lost.lookup(&zero);
		if (count)
			__sync_fetch_and_add(count, one);
	}
	spliced.delete(&thread);
	return 0;
}
