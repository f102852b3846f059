// SPDX-License-Identifier: GPL-2.0-only
/*
 * What becomes of pages at the very moment when it does, seen at the kernel's own functions
 * (moments.c). Where none of them can be probed, snapshots by tracepoints and system calls tell.
 */
#if FINDINGS
/* A file's page cache as an end: what fill_end() says of a file in it. */
static __always_inline u64 end_of_cache(u64 mapping)
{
	u64 sb = read64(read64(mapping + MAPPING_HOST) + INODE_SB);

	return read64(sb + SB_TYPE) | ((read64(sb + SB_FLAGS) & SB_KERNMOUNT) != 0);
}

/*
 * A page that enters a page cache by itself, not in the place of another one.
 *
 * @after: it is in there already: its mapping tells nothing
 */
static __always_inline void judge_inserted(u64 process, u64 folio, u64 mapping, bool after)
{
	struct finding_key key = {.process = process, .source = END_UNKNOWN, .via = VIA_INSERT};
	struct facts facts = {.class = NR_CLASSES};

	load_folio_facts(&facts, folio);
	facts.moment = AT_INSERT;
	if (after)
		facts.mapping = 0;
	key.name = judge_insert(&facts, 0);
	if (!key.name)
		return;
	facts.page = plain(folio);
	key.destination = end_of_cache(mapping);
	record(&key, &facts, read64(mapping + MAPPING_HOST));
}

#if MEASURED
BPF_ARRAY(inserts_probed, u32, 1); /* moments.c sees each: the tracepoint need not be looked at */

/* A page that FUSE has asked a pipe for: fuse_try_move_folio() (fs/fuse/dev.c). */
struct asked {
	struct facts facts;
	u32 tid;
	u32 granted; /* by try_steal() */
	u32 judged;  /* it was moved, and looked at as it was */
	u32 pad;
};
BPF_TABLE("lru_hash", u64, struct asked, asked_pages, 4096);  /* where tracepoints tell the rest */
BPF_TABLE("lru_hash", u32, struct facts, stolen_pages, 1024); /* else: the last one, by thread */

static __always_inline struct asked *asked_for(u64 page)
{
	struct asked *asked = asked_pages.lookup(&page);

	return asked && asked->tid == (u32)bpf_get_current_pid_tgid() ? asked : 0;
}

/* Why a page stayed, as it was when FUSE asked for it; NO_REASON where that is not known. */
static __always_inline u32 why_not_given(struct facts *facts, u64 page)
{
	struct asked *asked = asked_for(page);
	u32 reason;

	if (!asked)
		return NO_REASON;
	reason = asked->granted ? why_put_back(&asked->facts) : why_refused(&asked->facts);
	if (reason)
		*facts = asked->facts;
	asked_pages.delete(&page);
	return reason;
}

/* Whether a page that was moved has been judged as it was. */
static __always_inline bool was_judged(u64 page)
{
	struct asked *asked = asked_for(page);
	bool judged = asked && asked->judged;

	if (asked)
		asked_pages.delete(&page);
	return judged;
}

static __always_inline void record_theft(u64 process, struct facts *facts, u32 reason)
{
	struct finding_key key = {.process = process,
				  .source = END_PIPE,
				  .destination = END_FUSE_DEVICE,
				  .name = STEAL_REFUSED,
				  .reason = reason ? reason : UNEXPLAINED,
				  .via = VIA_FUSE_REPLY};

	record(&key, facts, 0);
}

/* The page that was stolen last was not put into the page cache: fuse_check_page() refused it. */
static __always_inline void end_theft(u64 process)
{
	u32 tid = bpf_get_current_pid_tgid();
	struct facts *kept = stolen_pages.lookup(&tid), facts;

	if (!kept)
		return;
	facts = *kept;
	stolen_pages.delete(&tid);
	record_theft(process, &facts, why_put_back(&facts));
}
#endif
#endif

static __always_inline bool inserts_are_probed(void)
{
#if FINDINGS && MEASURED
	u32 zero = 0, *probed = inserts_probed.lookup(&zero);

	return probed && *probed;
#else
	return false;
#endif
}
