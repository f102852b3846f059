// SPDX-License-Identifier: GPL-2.0-only
/*
 * FUSE READ replies: the folios that the kernel waits to have filled, before and after. A folio
 * that was replaced was moved in (fuse_try_move_folio(), fs/fuse/dev.c).
 */
#if HAVE_FUSE && HAVE_IDENTITY && IDENTITY
#ifndef FUSE_READ
#define FUSE_READ 15
#endif
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

#if FINDINGS
/*
 * What became of each folio that a READ waited for, in the order of fuse_copy_args() and
 * fuse_copy_folio() (fs/fuse/dev.c, 6.18): a whole page is taken from the next buffer, unless
 * something is left of the one before.
 */
struct reply {
	struct finding_key key;
	u64 request;
	u64 array;
	u64 payload;
	u64 done;
	u64 left;    /* of the buffer that was copied from last */
	u64 to_copy; /* of the folio that was judged last */
	u32 nr;
	u32 folio;     /* the next one */
	u32 slot;      /* the next buffer */
	u32 direct_io; /* the pages are the client's own memory, not a page cache */
	struct facts before;
	struct facts now;
};
BPF_TABLE("percpu_array", u32, struct reply, replies, 1);
#define PROGRAM_JUDGE 0
#define PROGRAM_TAIL  1
BPF_PROG_ARRAY(fuse_programs, 2);
#define MAX_STEPS 24 /* of one program; the next goes on */

static __always_inline bool is_direct_io(u64 folio)
{
	u64 mapping = read64(folio + PAGE_MAPPING);
	u64 host = is_cache_page(mapping) ? read64(mapping + MAPPING_HOST) : 0;

	return !host || read64(read64(host + INODE_SB) + SB_MAGIC) != FUSE_SUPER_MAGIC;
}

/* The next buffer, which the place of a header comes before. */
static __always_inline struct offered *next_buffer(struct reply *reply, struct offers *kept)
{
	u64 slot = reply->slot;

	asm volatile("" : "+r"(slot)); /* the verifier must see the bound on the very register */
	if (slot >= MAX_OFFERED)
		return 0;
	asm volatile("" : "+r"(slot)); /* and before the address is made of it */
	return &kept->slots[slot];
}

/* Copies what is to be copied out of one buffer, as fuse_copy_fill() walks along them. */
static __always_inline void copy_from_buffer(struct reply *reply, struct offers *kept)
{
	struct offered *offered;

	if (!reply->left) {
		offered = next_buffer(reply, kept);
		if (!offered || reply->slot >= kept->nr) {
			reply->to_copy = 0;
			return;
		}
		reply->left = offered->length;
		reply->slot++;
	}
	if (reply->left > reply->to_copy) {
		reply->left -= reply->to_copy;
		reply->to_copy = 0;
	} else {
		reply->to_copy -= reply->left;
		reply->left = 0;
	}
}

/* Why a folio was copied. Fills in what is known of the buffer that it was copied from. */
static __always_inline u32 why_copied(struct reply *reply, struct offers *kept, u64 size,
				      u64 wanted)
{
	struct offered *offered = next_buffer(reply, kept);
	u32 reason;

	if (offered)
		recall_offer(&reply->before, offered);
	if (reply->direct_io)
		return CLIENT_DIRECT_IO;
	if (wanted < size)
		return LAST_PAGE;
	if (reply->left)
		return kept->slots[0].length > FUSE_OUT_HEADER ? HEADER_SHARES_BUFFER
							       : NOT_PAGE_ALIGNED;
	if (!offered)
		return UNEXPLAINED;
	if (size > 4096)
		return CLIENT_LARGE_FOLIO;
	if (offered->offset)
		return ODD_OFFSET;
	if (offered->length != size)
		return PARTIAL_PAGE;
#if MEASURED
	reason = why_not_given(&reply->before, offered->page);
	if (reason)
		return reason;
#endif
	if (offered->reason)
		return offered->reason;
	/* It may have come into use since: its buffer still holds it. */
	load_page_facts(&reply->before, offered->page);
	reason = why_refused(&reply->before);
	return reason ? reason : UNEXPLAINED;
}

/* Checks a page that was moved: is it its new owner's alone? */
static __always_inline u32 check_moved(struct reply *reply, struct offers *kept, u64 page)
{
	struct offered *offered = next_buffer(reply, kept);
	bool elsewhere = false;

	reply->slot++;
	if (!offered || offered->page != page)
		return NO_FINDING;
#if MEASURED
	if (was_judged(page))
		return NO_FINDING;
#endif
	recall_offer(&reply->before, offered);
	load_page_facts(&reply->now, page);
#if HAVE_EXTENTS
	if (is_cache_page(offered->mapping))
		elsewhere = cached_page(offered->mapping, read64(page + PAGE_INDEX)) == page &&
			    offered->mapping != reply->now.mapping;
#endif
	reply->now.class = offered->class;
	return judge_published(&reply->before, &reply->now, elsewhere);
}

static __always_inline void judge_folio(struct reply *reply, struct offers *kept, u64 before,
					u64 now)
{
	u64 size = now == before ? 4096 * pages_of(now) : 4096, rest = reply->payload - reply->done;
	u64 wanted = rest < size ? rest : size;

	reply->key.reason = NO_REASON;
	if (now != before) {
		reply->key.name = check_moved(reply, kept, now);
		reply->before = reply->now;
	} else {
		reply->key.name = STEAL_REFUSED;
		reply->key.reason = why_copied(reply, kept, size, wanted);
		reply->to_copy = wanted;
	}
	reply->done += wanted;
	if (reply->key.name)
		record(&reply->key, &reply->before,
		       is_cache_page(reply->before.mapping) || reply->direct_io
			       ? 0
			       : read64(read64(now + PAGE_MAPPING) + MAPPING_HOST));
}

/* One step along the reply: a folio, or one buffer that it is copied from. False at the end. */
static __always_inline bool judge_step(struct reply *reply, struct offers *kept,
				       struct fuse_read *before)
{
	u64 folio = reply->folio;

	if (reply->to_copy) {
		copy_from_buffer(reply, kept);
		return true;
	}
	asm volatile("" : "+r"(folio)); /* the verifier must see the bound on the very register */
	if (folio >= MAX_FUSE_PAGES || folio >= reply->nr || reply->done >= reply->payload)
		return false;
	reply->folio++;
	judge_folio(reply, kept, before->pages[folio], read64(reply->array + folio * 8));
	return true;
}

int tp_fuse_judge(u64 *ctx)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid(), i;
	struct reply *reply = replies.lookup(&zero);
	struct offers *kept = offers.lookup(&tid);
	struct fuse_read *before;

	if (!reply)
		return 0;
	before = fuse_reads.lookup(&reply->request);
	if (!before || !kept)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_STEPS; i++) {
		if (!judge_step(reply, kept, before)) {
			fuse_reads.delete(&reply->request);
			return 0;
		}
	}
	fuse_programs.call(ctx, PROGRAM_JUDGE);
	count_lost(LOST_FINDING);
	return 0;
}

/* Hands a READ's reply that was offered for a move over to tp_fuse_judge. */
static __always_inline void judge_reply(u64 *ctx, u64 request, u64 array, u64 nr)
{
	u32 zero = 0, tid = bpf_get_current_pid_tgid();
	struct reply *reply = replies.lookup(&zero);
	struct offers *kept = offers.lookup(&tid);

	if (!reply || !kept || kept->bytes <= FUSE_OUT_HEADER)
		return;
	__builtin_memset(reply, 0, sizeof(*reply));
	reply->key.process = kept->process;
	reply->key.source = END_PIPE;
	reply->key.destination = END_FUSE_DEVICE;
	reply->key.via = VIA_FUSE_REPLY;
	reply->request = request;
	reply->array = array;
	reply->nr = nr;
	reply->payload = kept->bytes - FUSE_OUT_HEADER;
	reply->direct_io = is_direct_io(read64(array));
	reply->left = kept->slots[0].length - FUSE_OUT_HEADER;
	if (kept->slots[0].length < FUSE_OUT_HEADER)
		reply->left = 0; /* a header in pieces: what follows is unexplained */
	reply->slot = 1;
	fuse_programs.call(ctx, PROGRAM_JUDGE);
}

#if CONTENTS
static __always_inline u64 reply_length(u64 request)
{
#if HAVE_FUSE_RING
	if (came_by_ring(request))
		return ring_reply_length(request, false);
#endif
	return (u32)read32(request + FUSE_REPLY_LENGTH) - FUSE_OUT_HEADER;
}

/* Looks at the page that a READ's reply ends in, or begins with where it ends with a page. */
static __always_inline void look_at_reply(u64 request, u64 array, u64 nr)
{
	u64 descs = read64(read64(request + FUSE_REQ_ARGS) + FUSE_ARGS_DESCS), folio, address;
	u32 zero = 0, i, at;
	struct reply *reply = replies.lookup(&zero);

	if (!reply || (u32)read32(request + FUSE_REPLY_ERROR) || is_direct_io(read64(array)))
		return;
	reply->payload = reply_length(request);
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_FUSE_PAGES; i++) {
		u32 length = read32(descs + i * 8 + FUSE_DESC_LENGTH);

		if (i >= nr)
			return;
		reply->folio = i;
		if (reply->payload < length)
			break;
		reply->payload -= length;
	}
	at = reply->payload + (u32)read32(descs + reply->folio * 8 + FUSE_DESC_OFFSET);
	folio = read64(array + reply->folio * 8) + (at >> 12) * PAGE_SIZE_OF;
	address = address_of(folio);
	if (!address || !judge_page_tail(address, at & 4095))
		return;
	__builtin_memset(&reply->key, 0, sizeof(reply->key));
	reply->key.process = current_process();
	reply->key.source = END_USER;
	reply->key.destination = END_FUSE_DEVICE;
	reply->key.via = VIA_FUSE_REPLY;
	reply->key.name = STALE_CONTENT_EXPOSED;
	load_page_facts(&reply->now, folio);
	reply->now.class = NR_CLASSES;
	reply->now.offset = at & 4095;
	record(&reply->key, &reply->now, 0);
}

int tp_fuse_tail(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0), array = 0, nr = pages_waiting(request, &array);

	look_at_reply(request, array, nr);
	judge_reply(ctx, request, array, nr);
	fuse_reads.delete(&request);
	return 0;
}
#endif

static __always_inline void note_end(void)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct offers *kept = offers.lookup(&tid);

	if (kept)
		kept->ended = 1;
}
#endif

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

#if HAVE_FUSE_RING
	count_ring_reply(request);
#endif
#if FINDINGS
	note_end();
#endif
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
#if CONTENTS
	fuse_programs.call(ctx, PROGRAM_TAIL);
#endif
#if FINDINGS
	judge_reply(ctx, request, array, nr);
#endif
out:
	fuse_reads.delete(&key);
	return 0;
}
#endif
