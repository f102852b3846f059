// SPDX-License-Identifier: GPL-2.0-only
/* Page-cache changes and page-table references, of followed processes. */

static __always_inline struct page_counts *current_page_counts(void)
{
	u64 process = current_process();
	struct page_counts none = {};

	if (!process)
		return 0;
	return page_counts.lookup_or_try_init(&process, &none);
}

#if HAVE_IDENTITY && IDENTITY
#define FOLIO_NR(folio) pages_of(folio)
#else
#define FOLIO_NR(folio) 1
#endif

int tp_mm_filemap_add_to_page_cache(u64 *ctx)
{
	struct page_counts *counts = current_page_counts();

	if (counts)
		counts->inserted += FOLIO_NR(tracepoint_arg(ctx, 0));
#if FINDINGS
	if (counts && !inserts_are_probed())
		judge_inserted(current_process(), tracepoint_arg(ctx, 0),
			       read64(tracepoint_arg(ctx, 0) + PAGE_MAPPING), true);
#endif
	return 0;
}

int tp_mm_filemap_delete_from_page_cache(u64 *ctx)
{
	struct page_counts *counts = current_page_counts();

	if (counts)
		counts->removed += FOLIO_NR(tracepoint_arg(ctx, 0));
#if FINDINGS
	note_removal(tracepoint_arg(ctx, 0)); /* whoever does it */
#endif
	return 0;
}

/* Fault-around: the range of the page cache that was offered to the page tables. */
int tp_mm_filemap_map_pages(u64 *ctx)
{
	struct page_counts *counts = current_page_counts();

	if (counts)
		counts->mapped += tracepoint_arg(ctx, 2) - tracepoint_arg(ctx, 1) + 1;
	return 0;
}

int tp_page_fault_user(u64 *ctx)
{
	struct page_counts *counts = current_page_counts();

	if (counts)
		counts->faults++;
	return 0;
}
