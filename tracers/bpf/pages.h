// SPDX-License-Identifier: GPL-2.0-only
/* Pages by identity: folios, pipe rings, page caches. */
#if HAVE_IDENTITY && IDENTITY

/* The largest pipe that is walked: 256 slots, 1 MiB, the default pipe-max-size. */
#define MAX_SLOTS 256

/* A folio, kept while walking so that its tail pages need no further reads. */
struct folio {
	u64 first; /* address of its first struct page */
	u64 span;  /* bytes of struct pages */
	u64 mapping;
	bool mapped; /* in some page table */
};

/*
 * compound_head() (include/linux/page-flags.h). A tail page has bit 0 set and holds the head's
 * address, or from 7.0 on, where struct pages are saved (HUGETLB_PAGE_OPTIMIZE_VMEMMAP), a mask
 * that leads to it. A mask has all high bits set, higher than any struct page lies.
 */
static __always_inline u64 head_of(u64 page)
{
	u64 head = read64(page + PAGE_HEAD);

	if (!(head & 1))
		return page;
	return (s64)head > -(1LL << 40) ? page & head : head - 1;
}

/* folio_nr_pages() (include/linux/mm.h); 1 where this kernel's layout does not tell. */
static __always_inline u64 pages_of(u64 head)
{
	u64 pages = 1;

#if HAVE_FOLIO
	if (read64(head + PAGE_FLAGS) & 1ULL << PG_HEAD_BIT)
		pages = (u32)read32(head + FOLIO_PAGES);
#endif
	return pages ? pages : 1;
}

static __always_inline void load_folio(struct folio *folio, u64 page)
{
	u64 pages;

	if (page - folio->first < folio->span)
		return;
	folio->first = head_of(page);
	folio->mapping = read64(folio->first + PAGE_MAPPING);
	pages = pages_of(folio->first);
	folio->span = pages * PAGE_SIZE_OF;
	/* Both counts start at -1. page_type shares the small one's place and is below -1. */
#if HAVE_MAPCOUNT
	if (pages > 1) {
		folio->mapped = (s32)read32(folio->first + FOLIO_MAPCOUNT) >= 0;
		return;
	}
#endif
	folio->mapped = (s32)read32(folio->first + PAGE_MAPCOUNT) >= 0;
}

/* PAGE_MAPPING_ANON, _KSM, _MOVABLE (include/linux/page-flags.h): not a page cache. */
#define MAPPING_FLAGS 3

static __always_inline u32 pipe_index(u64 address)
{
	return PIPE_HEAD_SIZE == 2 ? read16(address) : read32(address);
}

static __always_inline u64 pipe_of(u64 file)
{
	return read64(file + FILE_PRIVATE);
}

/* How the slots of a ring are judged. */
enum judge {
	JUDGE_MAPPING, /* is the page one of the page cache *mapping*? */
	JUDGE_FOREIGN, /* is it foreign to the page cache *mapping*? */
	JUDGE_MAPPED,  /* is it in a page table, so the very page of user memory? */
	JUDGE_RING,    /* does the other ring hold it too? */
};

/*
 * A walk along a ring. It lives in a map, not on the stack: what is loaded from a map is unknown
 * to the verifier, so that it checks the one loop below once for all callers.
 */
struct walk {
	u64 mapping;
	u64 bufs;
	u64 bytes;  /* stop when the slots seen hold so many */
	u64 proven; /* bytes that are proven if all slots are the same */
	u64 other_bufs;
	u64 mask;
	u64 start; /* first slot looked at */
	s64 step;  /* 1, or -1 to go back in time */
	u64 slots; /* at most so many */
	u64 other_mask;
	u64 other_start;
	u32 judge;
	u32 pad;
	/* From here on what was seen: zero at the start. */
	u64 same;    /* bytes in pages that are the other end's */
	u64 fresh;   /* bytes in pages that belong to nobody else */
	u64 total;   /* bytes in all slots seen */
	u64 partial; /* bytes of a buffer that was split between two rings */
	u32 nr_same;
	u32 nr_seen;
	u32 nr_mapped;
	u32 verdict;	 /* what follows for the call: enum verdict */
	u64 is_same;	 /* the folio, or page, that the walk has come to */
	u64 folio_at;	 /* where it began */
	u64 folio_total; /* bytes before it */
	struct folio folio;
};
BPF_TABLE("percpu_array", u32, struct walk, walks, NR_PROGRAM_PLACES);

static __always_inline struct walk *new_walk(u32 place, u64 bytes)
{
	struct walk *walk = walks.lookup(&place);

	if (!walk)
		return 0;
	__builtin_memset(&walk->same, 0, sizeof(*walk) - __builtin_offsetof(struct walk, same));
	walk->bytes = walk->proven = bytes;
	return walk;
}

static __always_inline u64 slot_at(u64 bufs, u64 index, u64 mask)
{
	return bufs + (index & mask) * BUF_SIZE;
}

/* Is the page in the walk's slot *i* the other end's? */
static __always_inline bool is_same_page(struct walk *walk, u64 page, u64 i)
{
	if (walk->judge == JUDGE_RING)
		return page == read64(slot_at(walk->other_bufs, walk->other_start + walk->step * i,
					      walk->other_mask) +
				      BUF_PAGE);
	load_folio(&walk->folio, page);
	if (walk->judge == JUDGE_MAPPED)
		return walk->folio.mapped;
	return (walk->folio.mapping == walk->mapping) ^ walk->judge;
}

/* Adds up the slots since *folio_at* and *folio_total*, which are all of one folio. */
static __always_inline void end_folio(struct walk *walk, u64 i, u64 total)
{
	u64 slots = i - walk->folio_at;

	if (walk->is_same) {
		walk->same += total - walk->folio_total;
		walk->nr_same += slots;
	}
	if (walk->folio.mapped)
		walk->nr_mapped += slots;
	walk->folio_at = i;
	walk->folio_total = total;
}

/* The next page of a folio takes two loads and no more: what is said of one goes for all. */
static __always_inline void walk_ring(struct walk *walk)
{
	u64 at = walk->start, total = walk->total, i;

#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SLOTS; i++) {
		u64 slot, page, length;

		if (i >= walk->slots || total >= walk->bytes)
			break;
		slot = look_at(slot_at(walk->bufs, at, walk->mask));
		at += walk->step;
		page = seen64(slot, BUF_PAGE);
		length = seen32(slot, BUF_LEN);
		if (page - walk->folio.first >= walk->folio.span) {
			end_folio(walk, i, total);
			walk->is_same = is_same_page(walk, page, i);
			if (!walk->is_same && !walk->folio.mapping &&
			    (u32)read32(page + PAGE_REFCOUNT) == 1)
				walk->fresh += length;
		}
		total += length;
	}
	end_folio(walk, i, total);
	walk->nr_seen = i;
}

static __always_inline void walk_newest(struct walk *walk, u64 pipe)
{
	u32 size = read32(pipe + PIPE_RING_SIZE);

	walk->bufs = read64(pipe + PIPE_BUFS);
	walk->mask = size - 1;
	walk->start = pipe_index(pipe + PIPE_HEAD) - 1;
	walk->step = -1;
	walk->slots = size;
}

/* Where in its page a buffer ends; a reader moves its start alone. */
static __always_inline u32 end_of_slot(u64 slot)
{
	return (u32)read32(slot + BUF_OFFSET) + (u32)read32(slot + BUF_LEN);
}

/* Pages that *bytes* ending at file position *end* touch. */
static __always_inline u32 pages_spanned(u64 end, u64 bytes)
{
	return ((end - 1) >> 12) - ((end - bytes) >> 12) + 1;
}

#if HAVE_EXTENTS
/* The page cache's entry at *index*: xas_load() (lib/xarray.c). 0 if there is none. */
#define DEFINE_CACHED_PAGE(name, load64, load8)                                                    \
	static __always_inline u64 name(u64 mapping, u64 index)                                    \
	{                                                                                          \
		u64 entry = load64(mapping + MAPPING_XA_HEAD);                                     \
		int level;                                                                         \
                                                                                                   \
		_Pragma("clang loop unroll(disable)") for (level = 0; level < 11; level++)         \
		{                                                                                  \
			u64 node = entry - 2, shift;                                               \
                                                                                                   \
			if ((entry & 3) != 2 || entry <= 4096)                                     \
				break;                                                             \
			shift = load8(node + XA_SHIFT);                                            \
			if (level == 0 && index >> shift > 63)                                     \
				return 0;                                                          \
			entry = load64(node + XA_SLOTS + (index >> (shift & 63) & 63) * 8);        \
			/* A sibling: the slot of the head. */                                     \
			if ((entry & 3) == 2 && entry < 256)                                       \
				entry = load64(node + XA_SLOTS + (entry >> 2) * 8);                \
		}                                                                                  \
		/* Values are shadows of evicted pages. */                                         \
		return entry & 1 ? 0 : entry;                                                      \
	}
DEFINE_CACHED_PAGE(cached_page, read64, read8)
DEFINE_CACHED_PAGE(slow_cached_page, slow64, slow8)
#endif

static __always_inline void clamp_add(u64 *to, u64 bytes, u64 limit)
{
	*to += bytes < limit ? bytes : limit;
}

/*
 * Slots that a reader has drained since keep their page but lose their length. So: if every slot
 * seen is the same, all of the call's bytes are; otherwise the lengths decide.
 */
static __always_inline bool all_same(struct walk *walk)
{
	return walk->nr_seen && walk->nr_same == walk->nr_seen;
}
#endif /* HAVE_IDENTITY */
