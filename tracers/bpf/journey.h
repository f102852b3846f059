// SPDX-License-Identifier: GPL-2.0-only
/*
 * Journeys: all that happens to a few chosen pages, event by event, in a ring buffer that
 * journey.py reads and rsplice/journey.py sorts into stories. Here is which pages are followed, and
 * how they are told of; the probes are in journey.c. Attached only when asked for.
 *
 * A page is known by the address of its struct page, of the first one of a large folio, from the
 * moment it is chosen until it is freed: after that the same struct page is another page.
 *
 * Where pages of findings are asked for (JOURNEY_FINDINGS, a bit for each name), the places go
 * round: a page that has left its pipe, and that no finding was about, makes room for the next.
 */
#if JOURNEY && HAVE_IDENTITY && IDENTITY

#ifndef PAGE_SIZE
#define PAGE_SIZE 4096 /* BCC's macro for ring buffers counts in pages */
#endif

/* The order is that of journey.py. */
enum step {
	STEP_QUEUED,
	STEP_TAKEN,
	STEP_MOVED,
	STEP_FILLED,
	STEP_INSERTED,
	STEP_REMOVED,
	STEP_MAPPED,
	STEP_UNMAPPED,
	STEP_DIRTIED,
	STEP_WRITTEN,
	STEP_LRU,
	STEP_SENT,
	STEP_FREED,
	STEP_MARK,
	STEP_FINDING,
	STEP_RELEASED,
	STEP_ASKED,
};

/* Of STEP_FILLED, and of STEP_QUEUED and STEP_TAKEN. */
enum how {
	HOW_PLAIN,
	HOW_DEVICE,   /* a block device's DMA */
	HOW_REPLY,    /* copied out of a FUSE reply */
	HOW_INTERNAL, /* by the pipe within sendfile or copy_file_range */
	HOW_ONWARD,   /* from another pipe */
	HOW_TEED,     /* from another pipe, which keeps it */
	HOW_KEPT,     /* the destination's page cache has this very page */
	HOW_GRANTED,  /* FUSE may have it */
};

struct journey_event {
	u64 time;
	u64 mapping;
	u64 flags;
	u64 index;
	u64 inode;
	u64 end;	 /* the other end of the call, as in ends.h */
	u64 call;	 /* the librsplice call that the thread is in, 0 for none */
	u64 call_time;	 /* when that reserved */
	u64 call_filled; /* when it last told of a fill; of a mark: bytes */
	u64 born;	 /* of the first event of a page: when it was allocated */
	u64 filled; /* and when a device filled it; of a mark: what it is; of a finding: its reason
		     */
	u64 page;   /* the address of its struct page */
	u64 born_mapped; /* when memory was first mapped */
	u32 id;
	u32 step;
	u32 via;
	u32 how;
	u32 pid; /* 0 where it is not known who */
	u32 tid;
	s32 refcount;
	s32 mapcount;
	u32 pages;
	u32 device;
	u32 born_pid;
	u32 born_exact;
	u32 first;
	u32 direct;
	u32 slots; /* of the pipe, one behind the other, that hold the page or its folio */
	u32 exact; /* told at that very moment, not by a look afterwards */
	char comm[16];
	char born_comm[16];
	char name[32];
};
BPF_RINGBUF_OUTPUT(journey_ring, JOURNEY_RING_PAGES);

struct journey {
	u32 id;
	u32 events;
	u32 fresh;  /* no event of it yet */
	u32 mapped; /* in some page table, when last looked at */
	s32 queued; /* buffers of pipes that hold it, as far as was seen */
	u32 moved;  /* a FUSE reply has just moved it in */
	u32 found;  /* a finding that was asked for is about it: its place is kept */
	u32 last;   /* finding and reason that were told last, 0 after anything else */
	u32 row;    /* steps of a large folio's buffers that were told since anything else: bits */
	u64 time;   /* when it was chosen */
};
BPF_HASH(journeys, u64, struct journey, 2 * JOURNEY_MAX);
BPF_TABLE("lru_hash", u32, u64, journey_claims, 1024); /* page number -> page: one wins */
BPF_ARRAY(journey_pages, u64, JOURNEY_MAX);	       /* place -> page, for walks; 0 once freed */
BPF_ARRAY(journey_taken, u32, 1);
BPF_ARRAY(journey_limit, u32, 1); /* so many may be taken in all; rsplice raises it as it reads */
BPF_HASH(journey_kept, u32, u32, 256); /* finding and reason -> pages kept of it; 0: of all */

enum { UNKEPT_FULL, UNKEPT_RING, NR_UNKEPT };
BPF_ARRAY(journey_unkept, u64, NR_UNKEPT);
BPF_TABLE("lru_hash", u32, u64, journey_beyond, 1024); /* page number -> events beyond its share */

/* A file whose page cache is followed: its descriptor in rsplice itself, then its mapping. */
struct target {
	u64 fd;
	u64 mapping;
	u64 pid; /* of rsplice */
};
BPF_ARRAY(journey_target, struct target, 1);

/* What is known of pages that were allocated lately, in case one is chosen. */
struct birth {
	u64 time;
	u64 filled;
	u64 mapped;
	u32 pid;
	u32 exact;
	char comm[16];
};
BPF_TABLE("lru_hash", u64, struct birth, births, 16384);

/* A chosen page that was freed: the call that did it tells only when it returns what it took. */
struct gone {
	struct journey journey;
	u64 time;
	u32 tid;
	u32 pad;
};
BPF_TABLE("lru_hash", u64, struct gone, journeys_gone, 1024);

/* A page fault that is being served: mm_filemap_fault comes before the page is mapped. */
struct fault {
	u64 mapping;
	u64 index;
};
BPF_TABLE("lru_hash", u32, struct fault, journey_faults, 1024);

/* The call of librsplice that a thread is in. */
struct journey_call {
	u64 process;
	u64 id;
	u64 time;
	u64 filled;
	u32 depth; /* calls that are open: with several nobody knows whose a page is */
	u32 watched;
};
BPF_TABLE("lru_hash", u32, struct journey_call, journey_calls, 1024);

static __always_inline void count_unkept(u32 why)
{
	u64 *count = journey_unkept.lookup(&why);

	if (count)
		__sync_fetch_and_add(count, 1);
}

static __always_inline bool any_journey(void)
{
	u32 zero = 0, *taken = journey_taken.lookup(&zero);

	return taken && *taken;
}

/* A page cannot crowd out others: what it has beyond its share is counted, but for its end. */
static __always_inline bool within_share(struct journey *journey, u32 step)
{
	u64 one = 1, *beyond;
	u32 id = journey->id;

	__sync_fetch_and_add(&journey->events, 1);
	if (journey->events <= JOURNEY_SHARE || step == STEP_FREED || step == STEP_REMOVED)
		return true;
	beyond = journey_beyond.lookup(&id);
	if (beyond)
		__sync_fetch_and_add(beyond, 1);
	else
		journey_beyond.update(&id, &one);
	return false;
}

/* The last part of the file's name, and its inode. */
static __always_inline void tell_file(struct journey_event *event, u64 mapping)
{
	u64 inode, dentry;

	event->mapping = mapping;
	if (!mapping || mapping & MAPPING_FLAGS)
		return;
	inode = read64(mapping + J_MAPPING_HOST);
	if (!inode)
		return;
	event->inode = read64(inode + J_INODE_INO);
	event->device = read32(read64(inode + INODE_SB) + J_SB_DEV);
#if J_HAVE_NAME
	dentry = read64(inode + J_INODE_DENTRY);
	if (dentry)
		read_kernel_string(event->name, sizeof(event->name),
				   (void *)read64(dentry - J_DENTRY_ALIAS + J_DENTRY_NAME));
#endif
}

static __always_inline void tell_state(struct journey_event *event, u64 head)
{
	event->flags = read64(head + PAGE_FLAGS);
	event->index = read64(head + J_FOLIO_INDEX);
	event->refcount = read32(head + PAGE_REFCOUNT);
	event->pages = pages_of(head);
	event->mapcount = (s32)read32(head + PAGE_MAPCOUNT) + 1;
#if HAVE_MAPCOUNT
	if (event->pages > 1)
		event->mapcount = (s32)read32(head + FOLIO_MAPCOUNT) + 1;
#endif
	if (event->mapcount < 0) /* page_type shares the place */
		event->mapcount = 0;
	tell_file(event, read64(head + PAGE_MAPPING));
}

static __always_inline void tell_birth(struct journey_event *event, u64 head)
{
	struct birth *birth = births.lookup(&head);

	event->first = 1;
	if (!birth)
		return;
	event->born = birth->time;
	event->filled = birth->filled;
	event->born_mapped = birth->mapped;
	event->born_pid = birth->pid;
	event->born_exact = birth->exact;
	__builtin_memcpy(event->born_comm, birth->comm, sizeof(event->born_comm));
}

static __always_inline void tell_who(struct journey_event *event)
{
	u64 id = bpf_get_current_pid_tgid();
	struct journey_call *call;
	u32 tid = id;

	event->pid = id >> 32;
	event->tid = tid;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	call = journey_calls.lookup(&tid);
	if (!call || call->depth != 1)
		return;
	call->watched = 1;
	event->call = call->id;
	event->call_time = call->time;
	event->call_filled = call->filled;
}

/*
 * What is to be told of a page. Programs that walk along many pages only note them on the way, and
 * tell of them in a loop of its own: what is loaded from a map is unknown to the verifier, so that
 * it need not follow each combination of what may have been found.
 */
struct hit {
	u64 head;
	u64 time; /* of a page that is gone: when it went */
	u64 end;
	u32 step;
	u32 via;
	u32 how;
	u32 direct;
	u32 nobody; /* the current process has nothing to do with it */
	u32 slots;
	u32 exact;
};

struct hits {
	u64 nr;
	struct hit hit[JOURNEY_HITS];
};

/* Interrupts come in between: each level has a list of its own. */
enum level { LEVEL_TASK, LEVEL_DISK, LEVEL_NETWORK, NR_LEVELS };
BPF_TABLE("percpu_array", u32, struct hits, journey_hits, NR_LEVELS);

static __always_inline struct hits *new_hits(u32 level)
{
	struct hits *hits = journey_hits.lookup(&level);

	if (hits)
		hits->nr = 0;
	return hits;
}

/* The next free place, which only has its page yet; 0 and counted where there is none. */
static __always_inline struct hit *add_hit(struct hits *hits, u64 head, u32 step)
{
	u64 at = hits->nr;
	struct hit *hit;

	if (at >= JOURNEY_HITS) {
		count_unkept(UNKEPT_FULL);
		return 0;
	}
	asm volatile("" : "+r"(at)); /* the verifier must see the bound on the very register */
	hit = &hits->hit[at & (JOURNEY_HITS - 1)];
	__builtin_memset(hit, 0, sizeof(*hit));
	hit->head = head;
	hit->step = step;
	hits->nr = at + 1;
	return hit;
}

/*
 * Each buffer of a large folio is asked for, and released, by itself. Of several in a row the first
 * is told: they would use up what is kept of a page. Granted and refused are not the same.
 */
static __always_inline bool is_told_already(struct journey *journey, struct hit *hit)
{
	u32 step = hit->step == STEP_RELEASED ? 1 : hit->how == HOW_GRANTED ? 2 : 4;

	if ((hit->step != STEP_ASKED && hit->step != STEP_RELEASED) || pages_of(hit->head) <= 1) {
		journey->last = journey->row = 0;
		return false;
	}
	if (journey->row & step)
		return true;
	journey->row |= step;
	return false;
}

static __always_inline void tell(struct journey *journey, struct hit *hit)
{
	struct journey_event *event;

	if (is_told_already(journey, hit))
		return;
	if (!within_share(journey, hit->step))
		return;
	event = journey_ring.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count_unkept(UNKEPT_RING);
		return;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time = hit->time ? hit->time : bpf_ktime_get_ns();
	event->id = journey->id;
	event->page = hit->head;
	event->step = hit->step;
	event->via = hit->via;
	event->how = hit->how;
	event->end = hit->end;
	event->direct = hit->direct;
	event->slots = hit->slots;
	event->exact = hit->exact;
	if (!hit->nobody)
		tell_who(event);
	if (hit->time)
		event->refcount = -1; /* the page is somebody else's by now: not known */
	else
		tell_state(event, hit->head);
	if (journey->fresh) {
		journey->fresh = 0;
		tell_birth(event, hit->head);
	}
	journey_ring.ringbuf_submit(event, 0);
}

static __always_inline void tell_hits(struct hits *hits)
{
	u32 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < JOURNEY_HITS; i++) {
		struct hit *hit = &hits->hit[i];
		struct journey *journey;
		struct gone *gone;
		u64 head;

		if (i >= hits->nr)
			break;
		head = hit->head; /* 0 finds nothing */
		if (hit->time) {
			gone = journeys_gone.lookup(&head);
			journey = gone ? &gone->journey : 0;
		} else {
			journey = journeys.lookup(&head);
		}
		if (journey)
			tell(journey, hit);
	}
}

static __always_inline bool is_mapped(u64 head)
{
#if HAVE_MAPCOUNT
	if (pages_of(head) > 1)
		return (s32)read32(head + FOLIO_MAPCOUNT) >= 0;
#endif
	return (s32)read32(head + PAGE_MAPCOUNT) >= 0;
}

/* The place of a page in walks. Numbers grow; with findings the places are a power of two. */
static __always_inline u32 place_of(u32 id)
{
	return JOURNEY_FINDINGS ? id & (JOURNEY_MAX - 1) : id;
}

/* A page in a pipe is not given up for another but after so long: it may be stuck there. */
#define PATIENCE_NS 1000000000ULL

/* Frees a place, unless the page there is kept or may yet be one of a finding. */
static __always_inline bool make_room(u32 place, u64 now)
{
	u64 *page = journey_pages.lookup(&place), head;
	struct journey *journey;

	if (!page || !*page)
		return page;
	head = *page;
	journey = journeys.lookup(&head);
	if (!journey)
		return true;
	if (journey->found || (journey->queued > 0 && now - journey->time < PATIENCE_NS))
		return false;
	journeys.delete(&head);
	return true;
}

static __always_inline u32 pages_kept(u32 what)
{
	u32 *count = journey_kept.lookup(&what);

	return count ? *count : 0;
}

/* How many pages may still be chosen. */
static __always_inline u32 pages_left(void)
{
	u32 zero = 0, *taken = journey_taken.lookup(&zero), *limit = journey_limit.lookup(&zero),
	    left;

	if (!taken || !limit || *taken >= *limit)
		return 0;
	if (JOURNEY_FINDINGS && pages_kept(0) >= JOURNEY_KEPT)
		return 0;
	left = *limit - *taken;
	return left < JOURNEY_MAX ? left : JOURNEY_MAX;
}

/* Adds a page, unless enough are followed already. */
static __always_inline struct journey *choose(u64 head)
{
	struct journey new = {.fresh = 1, .time = bpf_ktime_get_ns()};
	u32 zero = 0, *taken = journey_taken.lookup(&zero), id, place;

	if (!taken || !pages_left())
		return 0;
	id = *taken;
	if (journey_claims.insert(&id, &head)) /* another CPU has this number */
		return 0;
	*taken = id + 1;
	place = place_of(id);
	if (JOURNEY_FINDINGS && !make_room(place, new.time))
		return 0;
	new.id = id;
	new.mapped = is_mapped(head);
	if (journeys.insert(&head, &new))
		return 0;
	journey_pages.update(&place, &head);
	return journeys.lookup(&head);
}

static __always_inline u32 finding_number(u32 name, u32 reason)
{
	return name << 8 | reason;
}

/* Keeps a page of a finding that was asked for, from now on; false if there are enough of it. */
static __always_inline bool keep(struct journey *journey, u32 name, u32 reason)
{
	u32 what = finding_number(name, reason), all = 0, of_it = pages_kept(what) + 1,
	    of_all = pages_kept(all) + 1;

	if (!(JOURNEY_FINDINGS >> name & 1) || of_it > JOURNEY_EACH || of_all > JOURNEY_KEPT)
		return false;
	journey_kept.update(&what, &of_it);
	journey_kept.update(&all, &of_all);
	journey->found = 1;
	journey->events = JOURNEY_SHARE - JOURNEY_AFTER; /* a little of what follows, not all */
	return true;
}

/* Tells of a finding that is about a page, if that is followed. */
static __always_inline void journey_found(u32 name, u32 reason, u64 page)
{
	u64 head = page ? head_of(page) : 0;
	struct journey *journey = journeys.lookup(&head);
	struct journey_event *event;
	struct gone *gone;

	if (!journey) { /* the call that it is about may have freed it */
		gone = journeys_gone.lookup(&head);
		if (!gone || gone->tid != (u32)bpf_get_current_pid_tgid())
			return;
		journey = &gone->journey;
	}
	if (JOURNEY_FINDINGS && !journey->found && !keep(journey, name, reason))
		return;
	/* Of a large folio each page may be one occurrence. */
	if (journey->last == finding_number(name, reason))
		return;
	journey->last = finding_number(name, reason);
	if (!within_share(journey, STEP_FINDING))
		return;
	event = journey_ring.ringbuf_reserve(sizeof(*event));
	if (!event) {
		count_unkept(UNKEPT_RING);
		return;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time = bpf_ktime_get_ns();
	event->id = journey->id;
	event->page = head;
	event->pages = 1;
	event->step = STEP_FINDING;
	event->how = name;
	event->filled = reason;
	event->refcount = -1; /* its state is in the finding */
	tell_who(event);
	journey_ring.ringbuf_submit(event, 0);
}
#else
static __always_inline void journey_found(u32 name, u32 reason, u64 page)
{
}
#endif
