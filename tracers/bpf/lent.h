// SPDX-License-Identifier: GPL-2.0-only
/* The files whose pages calls have spliced, sent or copied: verified when the run ends (--verify).
 */
#if VERIFY && HAVE_IDENTITY && IDENTITY
struct lent_file {
	u64 inode;
	u32 device;
	u32 generation;
	u64 end; /* kind of its filesystem, as in ends.h */
};
BPF_HASH(lent_files, struct lent_file, u64, MAX_LENT);

static __always_inline void note_lent(struct call *call)
{
	struct lent_file file = {.end = call->source.id};
	u64 inode = call->source.inode, one = 1;

	if (!END_IS_FILESYSTEM(file.end) || call->source.direct)
		return;
	file.inode = read64(inode + INODE_INO);
	file.generation = read32(inode + INODE_GENERATION);
	file.device = read32(read64(inode + INODE_SB) + SB_DEV);
	if (lent_files.lookup(&file))
		return;
	remember_name(file.end);
	if (lent_files.update(&file, &one))
		count_lost(LOST_FINDING);
}
#else
static __always_inline void note_lent(struct call *call)
{
}
#endif
