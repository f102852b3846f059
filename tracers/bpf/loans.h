// SPDX-License-Identifier: GPL-2.0-only
/*
 * Files that lend their cached pages to pipes, so that who takes such a page out of its file, or
 * may write to it, is told of: known by page cache, with the pipes that they were lent to last.
 */
#if FINDINGS
#define LOAN_WAYS 4 /* pipes that are known of one file */

struct loan_key {
	u64 mapping;
	u64 way;
};
struct loan {
	u64 process;
	u64 source; /* kind of the file's filesystem, as in ends.h */
	u64 inode;  /* of the pipe, whose memory may be another's by now: its number tells */
	u64 number;
	u32 via;
	u32 pad;
};
BPF_TABLE("lru_hash", struct loan_key, struct loan, loans, 4096);
BPF_ARRAY(any_loans, u32, 1); /* whether there ever was one: most runs have none */

/* Pages that left their file while they were lent, by whom. */
BPF_TABLE("lru_hash", u64, struct deed, removals, 4096);

static __always_inline void note_loan(struct call *call)
{
	struct loan_key key = {};
	struct loan loan = {.process = call->process, .source = call->source.id, .via = call->via},
		    *known;
	u32 zero = 0, *any = any_loans.lookup(&zero);

	if (!any || !END_IS_FILESYSTEM(loan.source) || !END_IS_PIPE(call->destination.id) ||
	    call->source.direct)
		return;
	loan.inode = call->destination.inode;
	loan.number = read64(loan.inode + INODE_INO);
	key.mapping = read64(call->source.file + FILE_MAPPING);
	key.way = loan.number & (LOAN_WAYS - 1);
	known = loans.lookup(&key);
	if (known && known->number == loan.number)
		return;
	loans.update(&key, &loan);
	*any = 1;
}

static __always_inline bool nothing_is_lent(void)
{
	u32 zero = 0, *any = any_loans.lookup(&zero);

	return !any || !*any;
}

/*
 * Pages of a file from *page* on, and what is found of them in a pipe that they were lent to. In a
 * map for the same reason as struct walk.
 */
struct search {
	u64 page;
	u64 span; /* bytes of struct pages */
	u64 slot; /* one that holds such a page */
	u64 found;
};
enum searcher { SEARCH_REMOVED, SEARCH_MAPPED, NR_SEARCHERS };
BPF_TABLE("percpu_array", u32, struct search, searches, NR_SEARCHERS);

/* Looks into a loan's pipe, which may be gone. */
static __always_inline void search_pipe(struct search *search, struct loan *loan)
{
	u64 pipe = read64(loan->inode + INODE_PIPE), bufs, at, i;
	u32 mask, slots;

	search->found = 0;
	if (!pipe || read64(loan->inode + INODE_INO) != loan->number)
		return;
	bufs = read64(pipe + PIPE_BUFS);
	mask = read32(pipe + PIPE_RING_SIZE) - 1;
	at = pipe_index(pipe + PIPE_TAIL);
	slots = pipe_index(pipe + PIPE_HEAD) - at;
	if (PIPE_HEAD_SIZE == 2)
		slots &= 0xffff;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SLOTS; i++) {
		u64 slot = slot_at(bufs, at++, mask);

		if (i >= slots)
			break;
		if (read64(slot + BUF_PAGE) - search->page < search->span) {
			search->slot = slot;
			search->found++;
		}
	}
}

/* A followed file's folio leaves its page cache: noted if it is in a pipe. */
static __always_inline void note_removal(u64 folio)
{
	struct loan_key key = {};
	struct search *search;
	struct deed deed = {};
	u32 place = SEARCH_REMOVED;
	u64 head, way;

	if (nothing_is_lent())
		return;
	search = searches.lookup(&place);
	if (!search)
		return;
	key.mapping = read64(folio + PAGE_MAPPING);
	search->page = plain(folio);
	search->span = pages_of(folio) * PAGE_SIZE_OF;
#pragma clang loop unroll(disable)
	for (way = 0; way < LOAN_WAYS; way++) {
		struct loan *loan;

		key.way = way; /* which the verifier need not follow */
		loan = loans.lookup(&key);
		if (!loan)
			continue;
		search_pipe(search, loan);
		if (!search->found)
			continue;
		head = search->page;
		load_deed(&deed);
		removals.update(&head, &deed);
		return;
	}
}

/* Who has taken the page of a finding out of its file. */
static __always_inline void name_remover(struct finding_key *key, u64 page)
{
	u64 head = head_of(page);
	struct deed *deed = removals.lookup(&head);

	if (deed)
		name_deed(key, deed);
}
#endif
