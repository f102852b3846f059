// SPDX-License-Identifier: GPL-2.0-only
/*
 * FUSE READ replies: the folios that the kernel waits to have filled, before and after. A folio
 * that was replaced was moved in (fuse_try_move_folio(), fs/fuse/dev.c).
 */
#if HAVE_FUSE && HAVE_IDENTITY && IDENTITY
#define FUSE_READ      15
#define MAX_FUSE_PAGES 256

struct fuse_read {
	u64 pages[MAX_FUSE_PAGES];
};
BPF_TABLE("lru_hash", u64, struct fuse_read, fuse_reads, 512);
BPF_TABLE("percpu_array", u32, struct fuse_read, fuse_scratch, 1);

/* How many folios a READ waits for; 0 for other requests, and for more than are compared. */
static __always_inline u64 pages_waiting(u64 request, u64 *array)
{
	u64 args = read64(request + FUSE_REQ_ARGS);
	u64 nr;

	if ((u32)read32(request + FUSE_REQ_OPCODE) != FUSE_READ)
		return 0;
	*array = read64(args + FUSE_ARGS_PAGES);
	nr = (u32)read32(args + FUSE_ARGS_NR);
	return nr <= MAX_FUSE_PAGES ? nr : 0;
}

int tp_fuse_request_send(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0), array = 0, key = request;
	u64 nr = pages_waiting(request, &array);
	u32 zero = 0;
	struct fuse_read *scratch = fuse_scratch.lookup(&zero);

	if (!nr || !scratch)
		return 0;
	asm volatile("" : "+r"(nr)); /* the verifier must see the bound on the very register */
	if (nr > MAX_FUSE_PAGES)
		return 0;
	read_kernel(scratch->pages, nr * 8, (void *)array);
	fuse_reads.update(&key, scratch);
	return 0;
}

/* The reply to any other request has no folios: none of an earlier one must be left to it. */
static __always_inline void tell_nothing(void)
{
	struct note *note = current_note();

	if (note)
		note->fuse_bytes = note->fuse_pages = 0;
}

int tp_fuse_request_end(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0), array = 0, key = request, moved = 0, nr;
	struct note *note, none = {};
	struct fuse_read *before;
	u32 i, tid = bpf_get_current_pid_tgid();

	before = fuse_reads.lookup(&key);
	nr = pages_waiting(request, &array);
	if (!before || !nr) {
		tell_nothing();
		goto out;
	}
	if (!current_process())
		goto out;
	note = notes.lookup_or_try_init(&tid, &none);
	if (!note)
		goto out;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_FUSE_PAGES; i++) {
		if (i >= nr)
			break;
		/* Only single pages are moved, whatever size the kernel makes folios of. */
		if (read64(array + i * 8) != before->pages[i])
			moved += 4096;
	}
	/* Not added up: a reply that failed, or without payload, is never asked about. */
	note->fuse_bytes = moved;
	note->fuse_pages = nr;
out:
	fuse_reads.delete(&key);
	return 0;
}
#endif
