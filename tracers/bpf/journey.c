// SPDX-License-Identifier: GPL-2.0-only
/* The probes of journeys: what happens to pages that are followed (journey.h). */
#if JOURNEY && HAVE_IDENTITY && IDENTITY

static __always_inline u64 target_mapping(void)
{
	u32 zero = 0;
	struct target *target = journey_target.lookup(&zero);

	return target ? target->mapping : 0;
}

/* The journey of a page that is in a page cache, begun here if it is the chosen file's. */
static __always_inline struct journey *journey_of_cached(u64 head)
{
	struct journey *journey = journeys.lookup(&head);

	if (journey || !JOURNEY_FILE)
		return journey;
	if (read64(head + PAGE_MAPPING) != target_mapping() || !current_process())
		return 0;
	return choose(head);
}

/* --- allocation ---------------------------------------------------------------------------- */

int jt_mm_page_alloc(u64 *ctx)
{
	u64 page = tracepoint_arg(ctx, 0);
	struct birth birth = {.exact = 1};

	if (!page)
		return 0;
	journeys_gone.delete(&page);
	if (!current_process())
		return 0;
	birth.time = bpf_ktime_get_ns();
	birth.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(birth.comm, sizeof(birth.comm));
	births.update(&page, &birth);
	return 0;
}

int jt_mm_page_free(u64 *ctx)
{
	u64 page = tracepoint_arg(ctx, 0), none = 0;
	struct journey *journey = journeys.lookup(&page);
	struct hit hit = {.head = page, .step = STEP_FREED};
	struct gone gone = {};
	u32 place;

	births.delete(&page);
	if (!journey)
		return 0;
	tell(journey, &hit);
	gone.journey = *journey;
	gone.time = bpf_ktime_get_ns();
	gone.tid = bpf_get_current_pid_tgid();
	journeys_gone.update(&page, &gone);
	place = place_of(journey->id);
	journeys.delete(&page);
	journey_pages.update(&place, &none);
	return 0;
}

/* --- block devices ------------------------------------------------------------------------- */

#if J_HAVE_BLOCK
#define MAX_BIO_PAGES 256
#define REQ_OP_MASK   0xff
#define REQ_OP_READ   0
#define REQ_OP_WRITE  1

/* A walk along the pages of a bio, or of all bios of a request. In a map for the verifier. */
struct bio_walk {
	u64 next; /* bio */
	u64 vecs;
	u64 page;
	u64 last; /* the folio before */
	u32 nr;	  /* entries of vecs */
	u32 bytes;
	u32 done; /* bytes of the next entry that are somebody else's */
	u32 at;
	u32 left;
	u32 op;
};
BPF_TABLE("percpu_array", u32, struct bio_walk, bio_walks, NR_LEVELS);

/*
 * What is still to be transferred is told by bi_iter alone: bi_vcnt is 0 in clones, and from 7.0 on
 * in a bio over pages of a bio_vec (bio_iov_bvec_set(), block/bio.c), such as an O_DIRECT splice's.
 * Where all is done already, as at the end of a bio without a request, the owner's bi_vcnt is left.
 */
static __always_inline void enter_bio(struct bio_walk *walk, u64 bio, bool request)
{
	walk->bytes = read32(bio + J_BIO_SIZE);
	walk->vecs = read64(bio + J_BIO_VECS);
	walk->done = 0;
	if (walk->bytes) {
		walk->vecs += (u64)(u32)read32(bio + J_BIO_INDEX) * J_BVEC_SIZE;
		walk->done = read32(bio + J_BIO_DONE);
		walk->nr = ~0U;
	} else {
		walk->nr = read16(bio + J_BIO_VCNT);
		walk->bytes = ~0U;
	}
	walk->next = request ? read64(bio + J_BIO_NEXT) : 0;
	walk->at = walk->left = 0;
}

static __always_inline struct bio_walk *start_bio(u32 level, u64 bio, bool request)
{
	struct bio_walk *walk = bio_walks.lookup(&level);

	if (!walk || !bio)
		return 0;
	walk->op = (u32)read32(bio + J_BIO_OPF) & REQ_OP_MASK;
	walk->last = walk->page = 0;
	enter_bio(walk, bio, request);
	return walk->op <= REQ_OP_WRITE ? walk : 0;
}

/* The folio of the next page; 0 behind the last, SAME_FOLIO where there is none to look at. */
#define SAME_FOLIO 1
static __always_inline u64 next_folio(struct bio_walk *walk)
{
	u64 vec, head;
	u32 offset, length;

	if (!walk->left) {
		if (walk->at >= walk->nr || !walk->bytes) {
			if (!walk->next)
				return 0;
			enter_bio(walk, walk->next, true);
			return SAME_FOLIO;
		}
		vec = walk->vecs + (u64)walk->at++ * J_BVEC_SIZE;
		offset = (u32)read32(vec + J_BVEC_OFFSET) + walk->done;
		length = (u32)read32(vec + J_BVEC_LEN) - walk->done;
		if (length > walk->bytes)
			length = walk->bytes;
		walk->bytes -= length;
		walk->done = 0;
		walk->page = read64(vec + J_BVEC_PAGE) + (u64)(offset >> 12) * PAGE_SIZE_OF;
		walk->left = ((offset & 4095) + length + 4095) >> 12;
		if (!walk->left)
			return SAME_FOLIO;
	}
	head = head_of(walk->page);
	walk->page += PAGE_SIZE_OF;
	walk->left--;
	if (head == walk->last)
		return SAME_FOLIO;
	walk->last = head;
	return head;
}

/*
 * Pages that are allocated in bulk, as those of an O_DIRECT splice are (copy_splice_read(),
 * fs/splice.c, 6.5), pass no tracepoint then: alloc_pages_bulk() has none. That they are given to
 * a device is the first that is seen of them.
 */
int jt_block_bio_queue(u64 *ctx)
{
	struct birth birth = {};
	struct bio_walk *walk;
	u32 i;

	if (!current_process())
		return 0;
	walk = start_bio(LEVEL_TASK, tracepoint_arg(ctx, J_BIO_ARGUMENT), false);
	if (!walk || walk->op != REQ_OP_READ)
		return 0;
	birth.time = bpf_ktime_get_ns();
	birth.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(birth.comm, sizeof(birth.comm));
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_BIO_PAGES; i++) {
		u64 head = next_folio(walk);

		if (!head)
			break;
		if (head != SAME_FOLIO && !read64(head + PAGE_MAPPING))
			births.insert(&head, &birth);
	}
	return 0;
}

static __always_inline void tell_transfer(u64 bio, bool request)
{
	struct bio_walk *walk = start_bio(LEVEL_DISK, bio, request);
	struct hits *hits = new_hits(LEVEL_DISK);
	u64 now = bpf_ktime_get_ns();
	u32 i;

	if (!hits || !walk)
		return;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_BIO_PAGES; i++) {
		u64 head = next_folio(walk);
		struct birth *birth;
		struct hit *hit;

		if (!head)
			break;
		if (head == SAME_FOLIO)
			continue;
		forget(); /* loaded anew it is unknown, whichever way it was found */
		head = walk->last;
		if (journeys.lookup(&head)) {
			hit = add_hit(hits, head, walk->op ? STEP_WRITTEN : STEP_FILLED);
			if (hit) {
				hit->how = HOW_DEVICE;
				hit->nobody = 1;
			}
			continue;
		}
		birth = births.lookup(&head);
		if (birth && !walk->op && !birth->filled)
			birth->filled = now;
	}
	tell_hits(hits);
}

/* What goes through a request queue; a request may complete in parts, the last of which counts. */
int jt_block_rq_complete(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0);

	if (!(u8)tracepoint_arg(ctx, 1) &&
	    (u32)tracepoint_arg(ctx, 2) >= (u32)read32(request + J_RQ_LENGTH))
		tell_transfer(read64(request + J_RQ_BIO), true);
	return 0;
}

/* What does not: devices that are made of others, or of memory. */
int jt_block_bio_complete(u64 *ctx)
{
	u64 bio = tracepoint_arg(ctx, 1);

	if (!read8(bio + J_BIO_STATUS))
		tell_transfer(bio, false);
	return 0;
}
#endif

/* --- page caches --------------------------------------------------------------------------- */

static __always_inline void tell_known(u64 head, u32 step)
{
	struct journey *journey = journeys.lookup(&head);
	struct hit hit = {.head = head, .step = step};

	if (journey)
		tell(journey, &hit);
}

int jt_mm_filemap_add_to_page_cache(u64 *ctx)
{
	u64 head = tracepoint_arg(ctx, 0);
	struct journey *journey = journey_of_cached(head);
	struct hit hit = {.head = head, .step = STEP_INSERTED};

	if (journey)
		tell(journey, &hit);
	return 0;
}

int jt_mm_filemap_delete_from_page_cache(u64 *ctx)
{
	tell_known(tracepoint_arg(ctx, 0), STEP_REMOVED);
	return 0;
}

int jt_writeback_dirty_folio(u64 *ctx)
{
	tell_known(tracepoint_arg(ctx, 0), STEP_DIRTIED);
	return 0;
}

int jt_mm_lru_insertion(u64 *ctx)
{
	tell_known(tracepoint_arg(ctx, 0), STEP_LRU);
	return 0;
}

/* --- page tables --------------------------------------------------------------------------- */

/* Looks which of the pages are mapped now and were not before, or the other way round. */
static __always_inline void look_at_mapped(u64 mapping, u64 first, u64 last)
{
	struct hits *hits = new_hits(LEVEL_TASK);
	u32 i;

	if (!hits)
		return;
#pragma clang loop unroll(disable)
	for (i = 0; i < JOURNEY_MAX; i++) {
		u32 place = i;
		u64 *page = journey_pages.lookup(&place), head, index;
		struct journey *journey;
		struct hit *hit;
		bool mapped, ours;

		if (!page || !*page)
			continue;
		head = *page;
		journey = journeys.lookup(&head);
		if (!journey)
			continue;
		mapped = is_mapped(head);
		index = read64(head + J_FOLIO_INDEX);
		ours = mapping && read64(head + PAGE_MAPPING) == mapping && index <= last &&
		       index + pages_of(head) > first;
		/* Who unmapped it is not told: whoever notices need not have done it. */
		if (mapped == (journey->mapped != 0) || (mapped && !ours))
			continue;
		journey->mapped = mapped;
		hit = add_hit(hits, head, mapped ? STEP_MAPPED : STEP_UNMAPPED);
		if (hit)
			hit->nobody = !mapped;
	}
	tell_hits(hits);
}

/* Fault-around has mapped what it found of a range. */
int jt_mm_filemap_map_pages(u64 *ctx)
{
	if (any_journey())
		look_at_mapped(tracepoint_arg(ctx, 0), tracepoint_arg(ctx, 1),
			       tracepoint_arg(ctx, 2));
	return 0;
}

int jt_mm_filemap_fault(u64 *ctx)
{
	struct fault fault = {.mapping = tracepoint_arg(ctx, 0), .index = tracepoint_arg(ctx, 1)};
	u32 tid = bpf_get_current_pid_tgid();

	if (current_process())
		journey_faults.update(&tid, &fault);
	return 0;
}

/* Whatever is mapped or unmapped is counted right after: finish_fault() (mm/memory.c, 6.2). */
int jt_rss_stat(u64 *ctx)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct fault *fault;

	if (!any_journey())
		return 0;
	fault = journey_faults.lookup(&tid);
	look_at_mapped(fault ? fault->mapping : 0, fault ? fault->index : 0,
		       fault ? fault->index : 0);
	return 0;
}

/* --- FUSE replies and sockets -------------------------------------------------------------- */

#if HAVE_FUSE
/* Runs before fuse.c's program, which forgets what the request looked like before. */
int jt_fuse_request_end(u64 *ctx)
{
	u64 request = tracepoint_arg(ctx, 0), array = 0, key = request;
	u64 nr = pages_waiting(request, &array);
	struct fuse_read *before = fuse_reads.lookup(&key);
	struct hits *hits = new_hits(LEVEL_TASK);
	u32 i;

	if (!hits || !before || !nr || read32(request + J_FUSE_ERROR))
		return 0;
#if HAVE_FUSE_RING
	/* Nothing came by the reply: its server has had the pages filled. */
	if (came_by_ring(request) && in_place(request, read64(request + FUSE_REQ_ARGS), FUSE_READ))
		return 0;
#endif
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_FUSE_PAGES; i++) {
		u64 page, head;
		struct journey *journey;
		struct hit *hit;
		bool same;

		if (i >= nr)
			break;
		page = read64(array + i * 8);
		same = page == before->pages[i];
		head = head_of(page);
		journey = same ? journeys.lookup(&head) : journey_of_cached(head);
		if (!journey)
			continue;
		if (!same && journey->moved)
			continue; /* told as it was moved */
		journey->moved = !same;
		hit = add_hit(hits, head, same ? STEP_FILLED : STEP_MOVED);
		if (!hit)
			continue;
		hit->how = same ? HOW_REPLY : HOW_PLAIN;
		hit->via = VIA_FUSE_REPLY;
		hit->end = END_FUSE_DEVICE;
	}
	tell_hits(hits);
	return 0;
}
#endif

#if HAVE_NETWORK
int jt_net_dev_start_xmit(u64 *ctx)
{
	u64 skb = tracepoint_arg(ctx, 0), info, last = 0;
	struct hits *hits = new_hits(LEVEL_NETWORK);
	u32 i, nr;

	if (!hits || !any_journey())
		return 0;
	info = read64(skb + SKB_HEAD) + read32(skb + SKB_END);
	nr = read8(info + SHINFO_NR_FRAGS);
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SKB_FRAGS; i++) {
		struct hit *hit;
		u64 head;

		if (i >= nr)
			break;
		head = head_of(read64(info + SHINFO_FRAGS + i * FRAG_SIZE + FRAG_PAGE) & ~3ULL);
		if (head == last)
			continue;
		last = head;
		if (!journeys.lookup(&head))
			continue;
		hit = add_hit(hits, head, STEP_SENT);
		if (hit)
			hit->nobody = 1;
	}
	tell_hits(hits);
	return 0;
}
#endif

/* --- pipes --------------------------------------------------------------------------------- */

/* The slots of a pipe that one call filled or emptied. In a map for the verifier, as in pages.h. */
struct scan {
	u64 pipe;
	u64 bufs;
	u64 bytes;
	u64 mapping; /* of the source: pages that are still in there are still the same */
	u64 target;  /* mapping of the destination */
	u64 head;    /* of the slot looked at */
	u64 given;   /* bytes of the call that came out of a buffer that is not empty yet */
	struct end end;
	u32 mask;
	u32 newest; /* slot behind the last */
	u32 slots;
	u32 full; /* the newest so many still hold their page */
	u32 step;
	u32 via;
	u32 how;
	u32 tid;
};
BPF_TABLE("percpu_array", u32, struct scan, journey_scans, 1);
BPF_PROG_ARRAY(journey_programs, 2);

static __always_inline u32 fullness(u64 pipe)
{
	u32 full = pipe_index(pipe + PIPE_HEAD) - pipe_index(pipe + PIPE_TAIL);

	return PIPE_HEAD_SIZE == 2 ? full & 0xffff : full;
}

/*
 * How many slots, from the newest backwards, hold so many bytes. A buffer that was read has lost
 * its length to its offset: the sum of both is its size, or more, so that too few slots are taken
 * for the call's rather than too many. iter_file_splice_write() (fs/splice.c) leaves no size of a
 * buffer that it has emptied: it is taken for a whole page.
 */
static __always_inline void count_slots(struct scan *scan)
{
	u32 ring = scan->mask + 1, size, i;
	u64 total = scan->given;

	scan->slots = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SLOTS; i++) {
		u64 slot = slot_at(scan->bufs, scan->newest - 1 - i, scan->mask);

		if (i >= ring || total >= scan->bytes)
			break;
		size = (u32)read32(slot + BUF_LEN);
		if (scan->step == STEP_TAKEN || i >= scan->full)
			size += (u32)read32(slot + J_BUF_OFFSET);
		total += size ? size : 4096;
		scan->slots++;
	}
}

static __always_inline void open_pipe(struct scan *scan, u64 pipe)
{
	scan->pipe = pipe;
	scan->bufs = read64(pipe + PIPE_BUFS);
	scan->mask = read32(pipe + PIPE_RING_SIZE) - 1;
}

static __always_inline void scan_queued(struct scan *scan, u64 pipe)
{
	open_pipe(scan, pipe);
	scan->step = STEP_QUEUED;
	scan->newest = pipe_index(pipe + PIPE_HEAD);
	scan->full = fullness(pipe);
	scan->given = 0;
}

/* The slots that were emptied; a buffer that is left in part has given up to its offset. */
static __always_inline void scan_taken(struct scan *scan, u64 pipe)
{
	open_pipe(scan, pipe);
	scan->step = STEP_TAKEN;
	scan->newest = pipe_index(pipe + PIPE_TAIL);
	scan->full = 0;
	scan->given = 0;
	if (fullness(pipe))
		scan->given =
			(u32)read32(slot_at(scan->bufs, scan->newest, scan->mask) + J_BUF_OFFSET);
}

/* The pipe within sendfile: empty again, but its slots still show the pages of the last round. */
static __always_inline void scan_internal(struct scan *scan, u64 task)
{
	u64 pipe = read64(task + TASK_SPLICE_PIPE);
	u32 slots = (scan->bytes + 4095) >> 12;

	scan->slots = 0;
	if (!pipe)
		return;
	open_pipe(scan, pipe);
	scan->step = STEP_QUEUED;
	scan->how = HOW_INTERNAL;
	scan->slots = slots <= scan->mask ? slots : scan->mask + 1;
	scan->newest = scan->slots;
	scan->full = 0;
}

/* How many pages may still be chosen out of a pipe. */
static __always_inline u32 room_for_pages(void)
{
	return JOURNEY_FILE ? 0 : pages_left();
}

/* Whether a slot holds more of the folio that was noted last: then that is noted, too. */
static __always_inline bool more_of_it(struct hits *hits, u64 head, u32 back)
{
	u64 at = hits->nr - 1;
	struct hit *hit;

	asm volatile("" : "+r"(at)); /* the verifier must see the bound on the very register */
	hit = &hits->hit[at & (JOURNEY_HITS - 1)];
	if (!hits->nr || hit->head != head)
		return false;
	hit->direct = back;
	hit->slots++;
	return true;
}

/* Notes the pages in the slots that are followed, or may be chosen. */
static __always_inline void note_slots(struct scan *scan, struct hits *hits)
{
	u32 room = scan->step == STEP_QUEUED ? room_for_pages() : 0, i;

#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SLOTS; i++) {
		u32 back = scan->slots - 1 - i;
		u64 page, head;
		struct hit *hit;

		if (i >= scan->slots)
			break;
		page = read64(slot_at(scan->bufs, scan->newest - 1 - back, scan->mask) + BUF_PAGE);
		if (!page)
			continue;
		scan->head = head_of(page);
		forget(); /* loaded anew it is unknown, whichever way it was found */
		head = scan->head;
		if (more_of_it(hits, head, back))
			continue;
		if (hits->nr >= room && !journeys.lookup(&head) && !journeys_gone.lookup(&head))
			continue;
		hit = add_hit(hits, head, scan->step);
		if (hit) {
			hit->direct = back;
			hit->slots = 1;
		}
	}
}

/* Whether a page in a slot is followed, from here on if need be. */
static __always_inline bool is_queued(struct scan *scan, struct hit *hit)
{
	struct journey *journey;
	u64 head = hit->head;

	/* A reader was faster: the page may have been freed, and be another by now. */
	if (hit->direct >= scan->full &&
	    (!scan->mapping || read64(head + PAGE_MAPPING) != scan->mapping))
		return false;
	journey = journeys.lookup(&head);
	if (!journey && !JOURNEY_FILE)
		journey = choose(head);
	if (journey && scan->how != HOW_INTERNAL && scan->how != HOW_ONWARD)
		__sync_fetch_and_add(&journey->queued, hit->slots);
	return journey;
}

/* No more buffers of a page can have been taken than were queued. */
static __always_inline bool take(struct journey *journey, struct hit *hit)
{
	s32 queued = journey->queued;

	if (queued <= 0)
		return false;
	if (hit->slots > (u32)queued)
		hit->slots = queued;
	__sync_fetch_and_add(&journey->queued, -(s32)hit->slots);
	return true;
}

/* Whether a page that was taken out of a slot is followed. */
static __always_inline bool is_taken(struct scan *scan, struct hit *hit)
{
	u64 head = hit->head;
	struct gone *gone = journeys_gone.lookup(&head);
	struct journey *journey;

	if (gone && gone->tid == scan->tid) {
		hit->time = gone->time;
		gone->tid = 0;
		return take(&gone->journey, hit);
	}
	journey = journeys.lookup(&head);
	if (!journey || !take(journey, hit))
		return false;
	if (journey->moved && scan->end.id == END_FUSE_DEVICE) {
		journey->moved = 0; /* told already */
		return false;
	}
	return true;
}

/* Fills in what is to be told of a page; forgets it if nothing is. */
static __always_inline void complete_hit(struct scan *scan, struct hit *hit)
{
	u64 head = hit->head;

	if (scan->step == STEP_QUEUED ? !is_queued(scan, hit) : !is_taken(scan, hit)) {
		hit->head = 0;
		return;
	}
	hit->via = scan->via;
	hit->end = scan->end.id;
	hit->direct = scan->end.direct;
	hit->how = scan->how;
	if (scan->step == STEP_TAKEN && scan->target && !hit->time &&
	    read64(head + PAGE_MAPPING) == scan->target)
		hit->how = HOW_KEPT;
}

static __always_inline void complete_hits(struct scan *scan, struct hits *hits)
{
	u32 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < JOURNEY_HITS; i++) {
		if (i >= hits->nr)
			break;
		complete_hit(scan, &hits->hit[i]);
	}
}

static __always_inline bool is_pipe(u64 file)
{
	return file && (read16(read64(file + FILE_INODE) + INODE_MODE) & S_IFMT) == S_IFIFO;
}

/* Which slots a call filled or emptied. False where there are none. */
static __always_inline bool find_slots(struct scan *scan, u64 task, u64 regs, u32 shape)
{
	u64 first = file_of(task, read64(regs + REGS_ARG0)), source = USER_MEMORY, other = first;
	u64 second_fd = read64(
		regs + (shape == SHAPE_TEE || shape == SHAPE_SENDFILE ? REGS_ARG1 : REGS_ARG2));
	bool from_pipe, to_pipe;

	switch (shape) {
	case SHAPE_READ:
		source = first;
		other = USER_MEMORY;
		break;
	case SHAPE_WRITE:
		break;
	case SHAPE_VMSPLICE:
		if (!(read32(first + FILE_MODE) & FMODE_WRITE)) {
			source = first;
			other = USER_MEMORY;
		}
		break;
	case SHAPE_SPLICE:
	case SHAPE_TEE:
	case SHAPE_COPY_FILE_RANGE:
		source = first;
		other = file_of(task, second_fd);
		break;
	case SHAPE_SENDFILE:
		source = file_of(task, second_fd);
		break;
	default:
		return false;
	}
	from_pipe = source > USER_MEMORY && is_pipe(source);
	to_pipe = other > USER_MEMORY && is_pipe(other);
	scan->how = HOW_PLAIN;
	scan->mapping = source > USER_MEMORY ? read64(source + FILE_MAPPING) : 0;
	scan->target = other > USER_MEMORY ? read64(other + FILE_MAPPING) : 0;
	if (from_pipe)
		scan->mapping = 0;
	fill_end(&scan->end, from_pipe && !to_pipe ? other : source);
	if (scan->end.id == END_FUSE_DEVICE)
		scan->via = VIA_FUSE_REPLY;
	if (to_pipe && (shape != SHAPE_SENDFILE || SENDFILE_INTO_PIPE)) {
		if (from_pipe)
			scan->how = shape == SHAPE_TEE ? HOW_TEED : HOW_ONWARD;
		scan_queued(scan, pipe_of(other));
	} else if (from_pipe) {
		scan_taken(scan, pipe_of(source));
	} else if (shape == SHAPE_SENDFILE || shape == SHAPE_COPY_FILE_RANGE) {
		scan_internal(scan, task);
	} else {
		return false;
	}
	return true;
}

/* rsplice opens the file to be followed; what is behind its descriptor is found out here. */
static __always_inline void find_target(u64 task)
{
	u32 zero = 0;
	struct target *target = journey_target.lookup(&zero);

	if (target && target->pid == bpf_get_current_pid_tgid() >> 32 && !target->mapping)
		target->mapping = read64(file_of(task, target->fd - 1) + FILE_MAPPING);
}

int jt_sys_exit(u64 *ctx)
{
	u64 regs = tracepoint_arg(ctx, 0), nr = read64(regs + REGS_NR), task, *entry;
	u32 index = nr & (TABLE_SIZE - 1), zero = 0;
	s64 ret = tracepoint_arg(ctx, 1);
	struct scan *scan;

	entry = call_table.lookup(&index);
	if (!entry || !(u32)*entry || ret <= 0)
		return 0;
	task = bpf_get_current_task();
	if (JOURNEY_FILE)
		find_target(task);
	if (!process_of_task(task) || read32(task + TASK_STATUS) & TS_COMPAT || nr & X32_BIT)
		return 0;
	scan = journey_scans.lookup(&zero);
	if (!scan)
		return 0;
	scan->bytes = ret;
	scan->via = *entry >> 8 & 0xff;
	scan->tid = bpf_get_current_pid_tgid();
	if (find_slots(scan, task, regs, *entry & 0xff))
		journey_programs.call(ctx, 0);
	return 0;
}

/* Walks the slots. Programs of their own for the verifier's sake, as tp_walk is. */
int jt_scan(u64 *ctx)
{
	u32 zero = 0;
	struct scan *scan = journey_scans.lookup(&zero);
	struct hits *hits = new_hits(LEVEL_TASK);

	if (!scan || !hits)
		return 0;
	if (scan->how != HOW_INTERNAL)
		count_slots(scan);
	note_slots(scan, hits);
	journey_programs.call(ctx, 1);
	return 0;
}

int jt_complete(u64 *ctx)
{
	u32 zero = 0, level = LEVEL_TASK;
	struct scan *scan = journey_scans.lookup(&zero);
	struct hits *hits = journey_hits.lookup(&level);

	if (!scan || !hits)
		return 0;
	complete_hits(scan, hits);
	tell_hits(hits);
	return 0;
}

/* --- librsplice ---------------------------------------------------------------------------- */

static __always_inline void tell_mark(struct journey_call *call, u32 mark, u64 bytes, u32 detail)
{
	struct journey_event *event = journey_ring.ringbuf_reserve(sizeof(*event));
	u64 id = bpf_get_current_pid_tgid();

	if (!event) {
		count_unkept(UNKEPT_RING);
		return;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time = bpf_ktime_get_ns();
	event->step = STEP_MARK;
	event->pid = id >> 32;
	event->tid = id;
	event->call = call->id;
	event->call_time = call->time;
	event->call_filled = bytes;
	event->filled = mark;
	event->how = detail;
	journey_ring.ringbuf_submit(event, 0);
}

/* A probe of librsplice: told if a page of the call is followed, kept in case one will be. */
static __always_inline void journey_mark(u64 process, u32 mark, u64 id, u64 bytes, u32 detail,
					 bool ends)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct journey_call *call = journey_calls.lookup(&tid);
	struct journey_call new = {.process = process, .id = id, .depth = 1};

	if (!mark) { /* reserve */
		if (call && call->process == process) {
			call->depth++;
			return;
		}
		new.time = bpf_ktime_get_ns();
		journey_calls.update(&tid, &new);
		return;
	}
	if (!call || call->process != process)
		return;
	if (call->id == id && call->watched && call->depth == 1)
		tell_mark(call, mark, bytes, detail);
	else if (call->id == id && mark == 1)
		call->filled = bpf_ktime_get_ns();
	if (!ends)
		return;
	if (call->depth > 1)
		call->depth--;
	else
		journey_calls.delete(&tid);
}
#else
static __always_inline void journey_mark(u64 process, u32 mark, u64 id, u64 bytes, u32 detail,
					 bool ends)
{
}
#endif
