// SPDX-License-Identifier: GPL-2.0-only
/*
 * Functions of the kernel that give pages away, put them into page caches and page tables, and let
 * go of them: providers.py lists which, by version, and attaches these programs to them.
 *
 * They are hot functions, and of all processes. So each program finds out first whether the page,
 * or whoever does it, is followed.
 */
#if MEASURED
#if JOURNEY && HAVE_IDENTITY && IDENTITY
/* @head: the first page of a folio, as in all that follows */
static __always_inline struct journey *journey_of(u64 head)
{
	return any_journey() ? journeys.lookup(&head) : 0;
}

static __always_inline void tell_moment(struct journey *journey, u64 head, u32 step, u32 how)
{
	struct hit hit = {.head = head, .step = step, .how = how, .exact = 1};

	tell(journey, &hit);
}

static __always_inline void tell_asked(u64 page, bool granted)
{
	u64 head = head_of(page);
	struct journey *journey = journey_of(head);

	if (journey)
		tell_moment(journey, head, STEP_ASKED, granted ? HOW_GRANTED : HOW_PLAIN);
}

/* *new* takes the place of *old* in a page cache; it is not in there yet. */
static __always_inline void tell_moved(u64 old, u64 new)
{
	struct journey *journey = journeys.lookup(&new);
	u64 mapping = read64(old + PAGE_MAPPING);
	u64 sb = read64(read64(mapping + J_MAPPING_HOST) + INODE_SB);
	struct hit hit = {.head = new, .step = STEP_MOVED, .exact = 1};

	if (!journey && JOURNEY_FILE && mapping == target_mapping() && current_process())
		journey = choose(new);
	if (!journey)
		return;
	if (read64(sb + SB_MAGIC) == FUSE_SUPER_MAGIC) {
		journey->moved = 1; /* which the end of the request need not tell again */
		hit.via = VIA_FUSE_REPLY;
		hit.end = END_FUSE_DEVICE;
	}
	tell(journey, &hit);
}

static __always_inline int tell_mapped(u64 head)
{
	struct journey *journey = journey_of(head);

	if (!journey)
		return 0;
	journey->mapped = 1;
	tell_moment(journey, head, STEP_MAPPED, HOW_PLAIN);
	return 0;
}

static __always_inline int tell_unmapped(u64 head)
{
	struct journey *journey = journey_of(head);

	if (!journey)
		return 0;
	journey->mapped = is_mapped(head);
	tell_moment(journey, head, STEP_UNMAPPED, HOW_PLAIN);
	return 0;
}

/* Memory is mapped for the first time: kept in case the page is one that will be followed. */
static __always_inline int keep_mapped(u64 head)
{
	struct birth *birth = births.lookup(&head);

	if (birth && !birth->mapped)
		birth->mapped = bpf_ktime_get_ns();
	return 0;
}

/* folio_add_file_rmap_ptes(folio, ...) and the like at their return, and page_...(page, ...). */
#define AT_RMAP(name, told, wanted)                                                                \
	static __always_inline int name##_at(u64 *args, u64 result)                                \
	{                                                                                          \
		return told(tracepoint_arg(args, 0));                                              \
	}                                                                                          \
	AT_RETURN(name, 0)                                                                         \
	static __always_inline int name##_page_at(u64 *args, u64 result)                           \
	{                                                                                          \
		return wanted ? told(head_of(plain(tracepoint_arg(args, 0)))) : 0;                 \
	}                                                                                          \
	AT_RETURN(name##_page, 0)

AT_RMAP(jm_mapped, tell_mapped, any_journey())
AT_RMAP(jm_unmapped, tell_unmapped, any_journey())
AT_RMAP(jm_born, keep_mapped, true)

/* The release(pipe, buf) of a class of buffers: the page's reference is about to go. */
static __always_inline int jm_released_at(u64 pipe, u64 slot)
{
	struct journey *journey;
	u64 head;

	if (!any_journey())
		return 0;
	head = head_of(read64(slot + BUF_PAGE));
	journey = journey_of(head);
	if (journey)
		tell_moment(journey, head, STEP_RELEASED, HOW_PLAIN);
	return 0;
}
AT_ENTRY(jm_released)
#else
static __always_inline void tell_asked(u64 page, bool granted)
{
}

static __always_inline void tell_moved(u64 old, u64 new)
{
}
#endif

#if FINDINGS
/*
 * The try_steal(pipe, buf) of a class of buffers, which returns whether the page may be taken: FUSE
 * alone asks, and looks at a page that it was given (fuse_check_folio(), fs/fuse/dev.c) before it
 * puts it into the page cache.
 */
static __always_inline int see_theft(u64 slot, bool granted, bool of_filled)
{
	u64 process = process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task()), page;
	u32 zero = 0;
	struct buffer_classes *classes = buffer_classes.lookup(&zero);
	struct asked asked = {.tid = bpf_get_current_pid_tgid()};

	if (!process || !classes)
		return 0;
	/* user_page_pipe_buf_try_steal() ends in the one of filled buffers: it counts once. */
	if (of_filled && class_of(classes, read64(slot + BUF_OPS)) == USER_BUFFER)
		return 0;
	load_buffer_facts(&asked.facts, classes, slot);
	asked.facts.moment = AT_STEAL;
	asked.granted = granted;
	page = asked.facts.page;
	tell_asked(page, asked.granted);
#if FUSE_EVENTS
	asked_pages.update(&page, &asked);
#else
	end_theft(process);
	if (asked.granted)
		stolen_pages.update(&asked.tid, &asked.facts);
	else
		record_theft(process, &asked.facts, why_refused(&asked.facts));
#endif
	return 0;
}

static __always_inline int steal_buffer_at(u64 *args, u64 result)
{
	return see_theft(tracepoint_arg(args, 1), result & 0xff, false);
}
AT_RETURN(steal_buffer, 2)

static __always_inline int steal_filled_at(u64 *args, u64 result)
{
	return see_theft(tracepoint_arg(args, 1), result & 0xff, true);
}
AT_RETURN(steal_filled, 2)

/* What was seen of a page as it was stolen, before it is put anywhere; 0 where that is not known.
 */
static __always_inline struct facts *take_stolen(u64 page, u32 tid)
{
#if FUSE_EVENTS
	struct asked *asked = asked_for(page);

	if (asked)
		asked->judged = 1;
	return asked ? &asked->facts : 0;
#else
	struct facts *facts = stolen_pages.lookup(&tid);

	return facts && facts->page == page ? facts : 0;
#endif
}

/* *new* is about to take the place of *old*. */
static __always_inline void judge_move(u64 process, u64 old, u64 new)
{
	u64 mapping = read64(old + PAGE_MAPPING);
	u32 tid = bpf_get_current_pid_tgid(), references = 0;
	struct finding_key key = {.process = process,
				  .source = END_PIPE,
				  .destination = END_FUSE_DEVICE,
				  .via = VIA_FUSE_REPLY};
	struct facts facts = {.class = NR_CLASSES}, *before = take_stolen(new, tid);

	if (before) {
		references = before->references;
		facts.class = before->class;
		facts.offset = before->offset;
		facts.length = before->length;
	} else {
		key.source = END_UNKNOWN;
		key.destination = end_of_cache(mapping);
		key.via = VIA_INSERT;
	}
	load_folio_facts(&facts, new);
	facts.moment = AT_INSERT;
	key.name = judge_insert(&facts, references);
	if (key.name) {
		facts.page = plain(new);
		record(&key, &facts, read64(mapping + MAPPING_HOST));
	}
	stolen_pages.delete(&tid);
}

/* __filemap_add_folio(mapping, folio, ...) */
static __always_inline int insert_folio_at(u64 mapping, u64 folio)
{
	u64 process = process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task());

	if (process)
		judge_inserted(process, folio, mapping, false);
	return 0;
}
AT_ENTRY(insert_folio)

/* __add_to_page_cache_locked(page, mapping, ...), before 5.15 */
static __always_inline int insert_page_at(u64 page, u64 mapping)
{
	return insert_folio_at(mapping, page);
}
AT_ENTRY(insert_page)
#endif

#if FINDINGS
#define VM_WRITE  0x2
#define VM_SHARED 0x8

/* What map_lent() tells; in a map for want of stack, beside a finding's own and its journey. */
struct lent_mapping {
	struct finding_key key;
	struct facts facts;
};
BPF_TABLE("percpu_array", u32, struct lent_mapping, lent_mappings, 1);

/* Pages of a file have been mapped so that they can be written to: found if they are lent now. */
static __always_inline int map_lent(u64 fault, u64 page, u64 nr)
{
	u64 vma = read64(fault + VMF_VMA), flags = read64(vma + VMA_FLAGS);
	struct loan_key file = {};
	struct deed deed = {};
	u32 place = SEARCH_MAPPED, zero = 0;
	u64 way;
	struct search *search = searches.lookup(&place);
	struct lent_mapping *lent = lent_mappings.lookup(&zero);

	if (!search || !lent || (flags & (VM_WRITE | VM_SHARED)) != (VM_WRITE | VM_SHARED))
		return 0;
	__builtin_memset(lent, 0, sizeof(*lent));
	lent->key.destination = END_PIPE;
	lent->key.name = CHANGED_IN_FLIGHT;
	lent->key.reason = MAPPED_TO_WRITE;
	lent->facts.class = CACHE_BUFFER;
	search->page = plain(page);
	search->span = nr * PAGE_SIZE_OF;
	file.mapping = read64(head_of(search->page) + PAGE_MAPPING);
#pragma clang loop unroll(disable)
	for (way = 0; way < LOAN_WAYS; way++) {
		struct loan *loan;

		file.way = way; /* which the verifier need not follow */
		loan = loans.lookup(&file);
		if (!loan)
			continue;
		search_pipe(search, loan);
		if (!search->found)
			continue;
		lent->key.process = loan->process;
		lent->key.source = loan->source;
		lent->key.via = loan->via;
		load_slot_facts(&lent->facts, search->slot);
		lent->facts.moment = AT_MAP;
		record_all(&lent->key, &lent->facts, 0, search->found);
		load_deed(&deed);
		name_deed(&lent->key, &deed);
	}
	return 0;
}

/* set_pte_range(vmf, folio, page, nr, addr) (mm/memory.c), since 6.6 */
static __always_inline int map_range_at(u64 *args, u64 result)
{
	if (nothing_is_lent())
		return 0;
	return map_lent(tracepoint_arg(args, 0), tracepoint_arg(args, 2),
			(u32)tracepoint_arg(args, 3));
}
AT_RETURN(map_range, 0)

/* do_set_pte(vmf, page, addr), and before 5.12 alloc_set_pte(vmf, page) */
static __always_inline int map_page_at(u64 *args, u64 result)
{
	if (nothing_is_lent())
		return 0;
	return map_lent(tracepoint_arg(args, 0), tracepoint_arg(args, 1), 1);
}
AT_RETURN(map_page, 0)
#endif

#if HAVE_IDENTITY && IDENTITY
/* replace_page_cache_folio(old, new) and replace_page_cache_page(old, new, ...) */
static __always_inline int move_page_at(u64 old, u64 new)
{
	u64 process = process_of(bpf_get_current_pid_tgid() >> 32, bpf_get_current_task());
	u32 tid = bpf_get_current_pid_tgid();
	struct note none = {}, *note;

	tell_moved(old, new);
	if (!process)
		return 0;
#if FINDINGS
	judge_move(process, old, new);
#endif
#if !FUSE_EVENTS
	note = notes.lookup_or_try_init(&tid, &none);
	if (note) {
		note->fuse_bytes += 4096;
		note->fuse_pages++;
	}
#endif
	return 0;
}
AT_ENTRY(move_page)
#endif
#endif
