// SPDX-License-Identifier: GPL-2.0-only
/*
 * What is in the pages that wait in pipes (--integrity): a sum for each block of a page is taken
 * when it is queued, and again when it is to be consumed. Blocks, so that a buffer which is
 * consumed in parts is compared in what is left of it.
 *
 * Pages are read through the kernel's direct map of memory: __va() and page_to_pfn()
 * (arch/x86/include/asm/page.h, include/asm-generic/memory_model.h).
 */
#if FINDINGS && INTEGRITY
#define CONTENTS 1
#define BLOCK	 512
#define BLOCKS	 (4096 / BLOCK)

/* contents.py finds out. While base is 0 nothing is looked at. */
struct direct_map {
	u64 vmemmap; /* the first struct page */
	u64 base;    /* where the first page is mapped: page_offset_base */
};
BPF_ARRAY(direct_map, struct direct_map, 1);

struct contents_key {
	u64 pipe; /* number of its inode */
	u64 slot;
};

struct contents {
	u64 bufs; /* the ring, which fcntl(F_SETPIPE_SZ) replaces */
	u64 page;
	u32 number; /* of the slot: heads and tails only grow */
	u32 offset; /* what part of the page was queued */
	u32 length;
	u32 pad;
	u64 parts[BLOCKS]; /* of blocks: where each begins, and its size */
	u64 sums[BLOCKS];
};
BPF_TABLE("lru_hash", struct contents_key, struct contents, queued_contents, MAX_CONTENTS);

/*
 * In a map for the same reason as struct walk. What part of a block is read is kept there too: the
 * verifier would follow each of the parts to the end of the page.
 */
struct reading {
	u64 words[BLOCK / 8];
	u64 address; /* where the page is mapped */
	u64 start;   /* of the part, in the page */
	u64 size;
	struct contents_key key;
	struct contents now;
};
BPF_TABLE("percpu_array", u32, struct reading, readings, NR_PROGRAM_PLACES);

/* The part of block *i* that is queued. */
static __always_inline void clip_block(struct reading *reading, u32 i)
{
	u64 start = i * BLOCK, end = start + BLOCK, queued = reading->now.offset,
	    queued_end = queued + reading->now.length;

	reading->start = start < queued ? queued : start;
	reading->size = (end < queued_end ? end : queued_end) - reading->start;
	forget();
}

/*
 * The sum of the part of a block; 0 if nothing is queued of it, or if it cannot be read. Different
 * words make different sums, since an odd factor can be undone; where several changed, all but 1
 * in 2^64. Four sums side by side, as a processor can.
 */
#define FACTOR 0x9e3779b97f4a7c15ULL
static __always_inline u64 sum_block(struct reading *reading, u64 *part)
{
	u64 size = reading->size, one = size, two = 0, three = 0, four = 0;
	u32 i;

	if (size != BLOCK)
		__builtin_memset(reading->words, 0, sizeof(reading->words));
	asm volatile("" : "+r"(size)); /* the verifier must see the bound on the very register */
	if (size > BLOCK)	       /* or less than nothing */
		return 0;
	if (read_kernel(reading->words, size, (void *)(reading->address + reading->start))) {
		*part = 0; /* like no other: it is not compared */
		return 0;
	}
#pragma unroll
	for (i = 0; i < BLOCK / 8; i += 4) {
		one = one * FACTOR + reading->words[i];
		two = two * FACTOR + reading->words[i + 1];
		three = three * FACTOR + reading->words[i + 2];
		four = four * FACTOR + reading->words[i + 3];
	}
	return ((one * FACTOR + two) * FACTOR + three) * FACTOR + four;
}

/* Reads what waits in slot *number* of a ring. False where pages cannot be read. */
static __always_inline bool read_contents(struct reading *reading, u64 inode, u64 bufs, u32 mask,
					  u32 number)
{
	u64 slot = slot_at(bufs, number, mask), frame;
	u32 zero = 0, i;
	struct direct_map *map = direct_map.lookup(&zero);

	if (!map || !map->base)
		return false;
	reading->key.pipe = read64(inode + INODE_INO);
	reading->key.slot = number & mask;
	reading->now.bufs = bufs;
	reading->now.page = read64(slot + BUF_PAGE);
	reading->now.number = number;
	reading->now.offset = read32(slot + BUF_OFFSET);
	reading->now.length = read32(slot + BUF_LEN);
	frame = (reading->now.page - map->vmemmap) / PAGE_SIZE_OF;
	reading->address = map->base + (frame << 12);
#pragma clang loop unroll(disable)
	for (i = 0; i < BLOCKS; i++) {
		forget(); /* nothing is loaded in front of the loop, which 6.1 would refuse */
		clip_block(reading, i);
		reading->now.parts[i] = reading->start << 32 | reading->size;
		reading->now.sums[i] = sum_block(reading, &reading->now.parts[i]);
	}
	return true;
}

/* Keeps what was just queued. */
static __always_inline void keep_contents(struct reading *reading)
{
	queued_contents.update(&reading->key, &reading->now);
}

/* Whether what waits is not what was queued; told once. */
static __always_inline bool have_contents_changed(struct reading *reading)
{
	struct contents *before = queued_contents.lookup(&reading->key), *now = &reading->now;
	u64 changed = 0;
	u32 i;

	if (!before || before->bufs != now->bufs || before->page != now->page ||
	    before->number != now->number)
		return false;
#pragma unroll
	for (i = 0; i < BLOCKS; i++)
		changed |= now->parts[i] == before->parts[i] ? now->sums[i] ^ before->sums[i] : 0;
	if (changed)
		queued_contents.delete(&reading->key);
	return changed;
}

static __always_inline struct reading *reading_at(u32 place)
{
	return readings.lookup(&place);
}
#else
#define CONTENTS 0
#endif
