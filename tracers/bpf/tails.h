// SPDX-License-Identifier: GPL-2.0-only
/*
 * What lies behind the bytes that a page was filled with (--integrity): it must be zero before
 * anybody can see it.
 */
#if CONTENTS
/* Judges what is in the page at *address* from byte *filled* on. */
static __always_inline u32 judge_page_tail(u64 address, u32 filled)
{
	u32 i, at = filled;

#pragma clang loop unroll(disable)
	for (i = 0; i < 4096 / TAIL_BYTES; i++) {
		u64 words[TAIL_WORDS] = {};
		u64 size = TAIL_BYTES - at % TAIL_BYTES;

		if (at >= 4096)
			break;
		asm volatile("" : "+r"(size)); /* the verifier must see the bound */
		if (!size || size > TAIL_BYTES || read_kernel(words, size, (void *)(address + at)))
			break;
		if (judge_tail(words))
			return STALE_CONTENT_EXPOSED;
		at += size;
	}
	return NO_FINDING;
}

/* Where the page of a struct page is mapped; 0 where that is not known. */
static __always_inline u64 address_of(u64 page)
{
	u32 zero = 0;
	struct direct_map *map = direct_map.lookup(&zero);

	return map && map->base ? map->base + ((page - map->vmemmap) / PAGE_SIZE_OF << 12) : 0;
}

#if USDT
/*
 * Of a file on tmpfs that a call of librsplice has made longer: the page that its end lies in. A
 * uprobe's program reads slowly, and may be preempted: nothing of its own lies in maps by CPU.
 */
#define TMPFS_MAGIC 0x01021994

/* The inode of a file on tmpfs behind a descriptor; 0 for others. */
static __always_inline u64 tmpfs_inode(u32 fd)
{
	u64 table = slow64(slow64(bpf_get_current_task() + TASK_FILES) + FILES_FDT), file, inode;

	if (fd >= (u32)slow32(table + FDT_MAX))
		return 0;
	file = slow64(slow64(table + FDT_FD) + (u64)fd * 8);
	inode = slow64(file + FILE_INODE);
	if (!file || slow64(slow64(inode + INODE_SB) + SB_MAGIC) != TMPFS_MAGIC)
		return 0;
	return inode;
}

static __always_inline u64 tmpfs_size(u32 fd)
{
	u64 inode = tmpfs_inode(fd);

	return inode ? slow64(inode + INODE_SIZE) : 0;
}

/* As record() does, of a file. */
static __always_inline void record_tail(u64 process, u64 inode, u64 page, u64 size)
{
	u64 now = bpf_ktime_get_ns(), sb = slow64(inode + INODE_SB), alias, type;
	struct name name = {};
	struct finding_key key = {
		.process = process, .name = STALE_CONTENT_EXPOSED, .via = VIA_RSPLICE};
	struct finding fresh = {}, *known;

	key.source = END_USER;
	key.destination = slow64(sb + SB_TYPE) | ((slow64(sb + SB_FLAGS) & SB_KERNMOUNT) != 0);
	fresh.first = now;
	fresh.facts.page = page;
	fresh.facts.class = NR_CLASSES;
	fresh.facts.offset = size & 4095;
	fresh.facts.mapping = slow64(inode + INODE_MAPPING);
	fresh.index = size >> 12;
	fresh.inode = slow64(inode + INODE_INO);
	fresh.device = slow32(sb + SB_DEV);
	fresh.tid = bpf_get_current_pid_tgid();
	type = key.destination & ~1ULL;
	read_kernel_string(name.text, sizeof(name.text), (void *)slow64(type + FSTYPE_NAME));
	filesystem_names.update(&type, &name);
	alias = slow64(inode + INODE_DENTRY);
	if (alias)
		read_kernel_string(fresh.file, sizeof(fresh.file),
				   (void *)slow64(alias - DENTRY_ALIAS + DENTRY_NAME));
	known = findings.lookup_or_try_init(&key, &fresh);
	if (!known) {
		count_lost(LOST_FINDING);
		return;
	}
	__sync_fetch_and_add(&known->count, 1);
	known->last = now;
}

/* The call that *inside* tells of has published what it filled. */
static __always_inline void look_at_tail(u64 process, struct inside *inside)
{
	u64 inode = tmpfs_inode(inside->out), size, page = 0, address;

	if (!inode)
		return;
	size = slow64(inode + INODE_SIZE);
	if (size == inside->size || !(size & 4095))
		return;
#if HAVE_EXTENTS
	page = slow_cached_page(slow64(inode + INODE_MAPPING), size >> 12);
#endif
	if (!page)
		return;
	page += ((size >> 12) - slow64(page + PAGE_INDEX)) * PAGE_SIZE_OF;
	address = address_of(page);
	if (address && judge_page_tail(address, size & 4095))
		record_tail(process, inode, page, size);
}
#endif
#endif
