// SPDX-License-Identifier: GPL-2.0-only
/*
 * What follows from what was seen of a page or a buffer: no memory is read here, so that the same
 * text runs in the kernel and in tests, on states that no sound kernel shows.
 */

/* Findings; the order is that of findings.py. */
enum finding_name {
	NO_FINDING,
	STEAL_REFUSED,
	GIFT_STILL_MAPPED,
	TRUNCATED_IN_FLIGHT,
	CHANGED_IN_FLIGHT,
	STRANDED,
	MERGE_FLAG_ON_PAGE_CACHE,
	SHARED_FRAG_LOST,
	PUBLISHED_WHILE_MAPPED,
	PUBLISHED_WHILE_REFERENCED,
	PUBLISHED_ACTIVATED,
	DOUBLE_OWNER,
	LEAKED,
	STALE_CONTENT_EXPOSED,
};

/* Why a page was not moved, or what else tells findings of one name apart; as in findings.py. */
enum reason {
	NO_REASON,
	STILL_MAPPED,
	EXTRA_REFERENCE,
	SWAP_BACKED,
	DIRTY_PAGE,
	LARGE_FOLIO,
	NOT_YET_ON_LRU,
	PARTIAL_PAGE,
	ODD_OFFSET,
	NOSTEAL_BUFFER,
	NOT_A_GIFT,
	LEFT_ITS_FILE,
	CLIENT_DIRECT_IO,
	CLIENT_LARGE_FOLIO,
	HEADER_SHARES_BUFFER,
	NOT_PAGE_ALIGNED,
	LAST_PAGE,
	A_NOTIFICATION,
	NEVER_MOVES,
	OFFERED_BY_LIBRSPLICE,
	COULD_CHANGE,
	DID_CHANGE,
	WRITTEN_LATER,
	MAPPED_TO_WRITE,
	UNEXPLAINED,
};

/* Classes of pipe buffers, told by their table of operations; the order is that of findings.py. */
enum buffer_class { ANON_BUFFER, CACHE_BUFFER, USER_BUFFER, FILLED_BUFFER, NOSTEAL, NR_CLASSES };

/* When a page was looked at; the order is that of findings.py. */
enum moment {
	SNAPSHOT,  /* as a call or a request began or ended, or at its end */
	AT_STEAL,  /* as its pipe was asked to give it away */
	AT_INSERT, /* as it was put into a page cache */
	AT_MAP,	   /* as it was put into a page table */
};

/* include/linux/pipe_fs_i.h, 5.8 and later */
#define PIPE_BUF_FLAG_GIFT	0x04
#define PIPE_BUF_FLAG_CAN_MERGE 0x10

/* What was seen of a buffer and of its page, before the call that consumes it. */
struct facts {
	unsigned long long page;
	unsigned long long mapping; /* of its folio: 0 for none, low bits for anonymous memory */
	unsigned long long page_flags;
	unsigned int references;
	int mapcount;	    /* -1 while in no page table */
	unsigned int pages; /* of its folio */
	unsigned int class;
	unsigned int flags;
	unsigned int offset;
	unsigned int length;
	unsigned int moment; /* when it was seen: enum moment */
};

#define HAS_FLAG(facts, bit) ((facts)->page_flags >> (bit)&1)

static inline __attribute__((always_inline)) int is_cache_page(unsigned long long mapping)
{
	return mapping && !(mapping & 3); /* include/linux/page-flags.h: anonymous, KSM, movable */
}

/* A buffer that waits in a pipe, and is about to be consumed. */
struct waiting {
	unsigned int class;
	unsigned int flags;
	unsigned long long mapping; /* of its folio */
	int mapped;		    /* in some page table */
	int published; /* librsplice offers it for a move (SPLICE_F_MOVE), and so has unmapped it */
	int changed;   /* its content is not what was queued, which is looked at on request */
};

/* What is wrong with it. */
static inline __attribute__((always_inline)) unsigned int judge_buffer(struct waiting *buffer)
{
	if (buffer->class == CACHE_BUFFER) {
		/* copy_page_to_iter_pipe() and push_pipe(), lib/iov_iter.c before 5.17 */
		if (buffer->flags & PIPE_BUF_FLAG_CAN_MERGE)
			return MERGE_FLAG_ON_PAGE_CACHE;
		/* truncate_inode_folio(), folio_unmap_invalidate(), __remove_mapping() */
		if (!buffer->mapping)
			return TRUNCATED_IN_FLIGHT;
		return buffer->changed ? CHANGED_IN_FLIGHT : NO_FINDING;
	}
	if (buffer->class != USER_BUFFER || (!buffer->mapped && !buffer->changed))
		return NO_FINDING;
	if (!(buffer->flags & PIPE_BUF_FLAG_GIFT))
		return CHANGED_IN_FLIGHT;
	/* Others' gifts may be mapped: they promise nothing, and the kernel moves none. */
	return buffer->published && buffer->mapped ? PUBLISHED_WHILE_MAPPED : GIFT_STILL_MAPPED;
}

/* What the finding's name leaves open. */
static inline __attribute__((always_inline)) unsigned int reason_of(unsigned int name, int changed)
{
	switch (name) {
	case CHANGED_IN_FLIGHT:
		return changed ? DID_CHANGE : COULD_CHANGE;
	case GIFT_STILL_MAPPED:
		return changed ? WRITTEN_LATER : NO_REASON;
	case PUBLISHED_WHILE_MAPPED:
		return OFFERED_BY_LIBRSPLICE;
	}
	return NO_REASON;
}

/* A page whose only reference, beside that of the page cache, is the buffer's. */
static inline __attribute__((always_inline)) unsigned int references_expected(struct facts *facts)
{
	if (!is_cache_page(facts->mapping))
		return 1;
	return 1 + facts->pages + HAS_FLAG(facts, PG_PRIVATE_BIT);
}

/*
 * Why the page of a whole buffer cannot be taken: page_cache_pipe_buf_try_steal() and
 * user_page_pipe_buf_try_steal() (fs/splice.c), generic_pipe_buf_try_steal() and
 * anon_pipe_buf_try_steal() (fs/pipe.c), __remove_mapping() (mm/vmscan.c), fuse_check_folio()
 * and fuse_try_move_folio() (fs/fuse/dev.c), all as of 6.18. What a user can change comes first.
 */
static inline __attribute__((always_inline)) unsigned int why_refused(struct facts *facts)
{
	if (facts->class == NOSTEAL)
		return NOSTEAL_BUFFER;
	if (facts->class == USER_BUFFER && !(facts->flags & PIPE_BUF_FLAG_GIFT))
		return NOT_A_GIFT;
	if (facts->class == CACHE_BUFFER && !facts->mapping)
		return LEFT_ITS_FILE;
	if (facts->mapcount >= 0)
		return STILL_MAPPED;
	if (HAS_FLAG(facts, PG_SWAPBACKED_BIT))
		return SWAP_BACKED;
	if (facts->pages > 1)
		return LARGE_FOLIO;
	if (HAS_FLAG(facts, PG_DIRTY_BIT))
		return DIRTY_PAGE;
	if (facts->references > references_expected(facts)) {
		/* A page waits in a batch of its CPU, which holds a reference: folio_add_lru(). */
		if (facts->class == CACHE_BUFFER && !HAS_FLAG(facts, PG_LRU_BIT) &&
		    facts->references == references_expected(facts) + 1)
			return NOT_YET_ON_LRU;
		return EXTRA_REFERENCE;
	}
	return NO_REASON;
}

/*
 * What is wrong with a page that has just been moved into a page cache, still locked and not up
 * to date, so that nobody can have mapped or dirtied it since.
 *
 * @before: what was seen of it as it was offered
 * @now: what is seen of it in its new place
 * @elsewhere: whether the page cache that it came from still holds it
 *
 * The new owner, its request and a batch of the LRU refer to it. Lookups do so for a moment, so
 * that references count only if there were too many before too.
 */
#define PUBLISHED_REFERENCES 3
static inline __attribute__((always_inline)) unsigned int
judge_published(struct facts *before, struct facts *now, int elsewhere)
{
	if (elsewhere)
		return DOUBLE_OWNER;
	if (now->mapcount >= 0)
		return PUBLISHED_WHILE_MAPPED;
	if (HAS_FLAG(now, PG_SWAPBACKED_BIT) || HAS_FLAG(now, PG_DIRTY_BIT) ||
	    HAS_FLAG(now, PG_WRITEBACK_BIT))
		return PUBLISHED_ACTIVATED;
	if (before->references > references_expected(before) &&
	    now->references > PUBLISHED_REFERENCES)
		return PUBLISHED_WHILE_REFERENCED;
	return NO_FINDING;
}

/* Why FUSE did not put a page into a page cache though its pipe gave it away: fuse_check_folio().
 */
static inline __attribute__((always_inline)) unsigned int why_put_back(struct facts *facts)
{
	if (facts->mapcount >= 0)
		return STILL_MAPPED;
	if (HAS_FLAG(facts, PG_SWAPBACKED_BIT))
		return SWAP_BACKED;
	if (facts->pages > 1)
		return LARGE_FOLIO;
	return HAS_FLAG(facts, PG_DIRTY_BIT) ? DIRTY_PAGE : NO_REASON;
}

/*
 * What is wrong with a page that is about to be put into a page cache. Nobody else has it yet, so
 * that all of its references but one are others'. Lookups refer to a page for a moment, so that
 * there have to have been too many before, too.
 *
 * @before: references as it was stolen from a pipe; 0 where that is not known
 */
static inline __attribute__((always_inline)) unsigned int judge_insert(struct facts *facts,
								       unsigned int before)
{
	if (is_cache_page(facts->mapping))
		return DOUBLE_OWNER;
	if (facts->mapcount >= 0)
		return PUBLISHED_WHILE_MAPPED;
	if (HAS_FLAG(facts, PG_SWAPBACKED_BIT) || HAS_FLAG(facts, PG_DIRTY_BIT) ||
	    HAS_FLAG(facts, PG_WRITEBACK_BIT))
		return PUBLISHED_ACTIVATED;
	return facts->references > 1 && before > 1 ? PUBLISHED_WHILE_REFERENCED : NO_FINDING;
}

/* Page-cache pages may leave in a packet only if it says so (SKBFL_SHARED_FRAG, 5.14). */
#define SHARED_FRAG 2
static inline __attribute__((always_inline)) unsigned int judge_fragment(unsigned long long mapping,
									 unsigned int packet_flags)
{
	return is_cache_page(mapping) && !(packet_flags & SHARED_FRAG) ? SHARED_FRAG_LOST
								       : NO_FINDING;
}

/*
 * What lies behind the bytes that a page was filled with, some of it at a time. It was cleared
 * (fuse_copy_folio(), fs/fuse/dev.c; shmem_get_folio_gfp(), mm/shmem.c), or is of another owner.
 */
#define TAIL_BYTES 64
#define TAIL_WORDS (TAIL_BYTES / 8)
static inline __attribute__((always_inline)) unsigned int
judge_tail(const unsigned long long *words)
{
	unsigned long long set = 0;
	int i;

	for (i = 0; i < TAIL_WORDS; i++)
		set |= words[i];
	return set ? STALE_CONTENT_EXPOSED : NO_FINDING;
}
