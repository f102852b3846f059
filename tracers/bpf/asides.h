// SPDX-License-Identifier: GPL-2.0-only
/*
 * What rsplice.trace() tells apart within a followed process (rsplice/engine.py): calls of threads
 * that are busy with something else than the traced code, and calls on files of somebody else.
 * They are counted under keys of their own, so that each trace can take them or leave them.
 */
#define F_ASIDE (1 << 14) /* flags of a key, as those in maps.h: an import, a captured output */
#define F_OWN	(1 << 15) /* rsplice's own work */
#define LET_GO	2	  /* process.ended: not followed any more, though it goes on */

#if TRACES
struct thread {
	u64 adopter; /* key that the processes which it starts are followed under, 0 for its own */
	u64 aside;   /* F_ASIDE or F_OWN, or 0 */
};
BPF_HASH(threads, u32, struct thread, 8192);
BPF_HASH(left_out, u64, u64, 8192); /* flags by address of the struct file */
BPF_ARRAY(learned_file, u64, 1);

static __always_inline u32 aside_flags(u64 task, u64 source, u64 destination)
{
	u32 tid = read32(task + TASK_PID);
	struct thread *thread = threads.lookup(&tid);
	u64 *file, flags = thread ? thread->aside : 0;

	file = source > USER_MEMORY ? left_out.lookup(&source) : 0;
	if (file)
		flags |= *file;
	file = destination > USER_MEMORY ? left_out.lookup(&destination) : 0;
	if (file)
		flags |= *file;
	return flags;
}

/*
 * Run by traces.py alone (bpf(2), BPF_PROG_TEST_RUN): the struct file behind a descriptor of the
 * caller. Always by bpf_probe_read_kernel(): it is not loaded as a tracing program.
 */
int learn_file(u64 *ctx)
{
	u64 fd = tracepoint_arg(ctx, 0), files = 0, table = 0, array = 0, file = 0;
	u32 zero = 0;

	read_kernel(&files, 8, (void *)(bpf_get_current_task() + TASK_FILES));
	read_kernel(&table, 8, (void *)(files + FILES_FDT));
	read_kernel(&array, 8, (void *)(table + FDT_FD));
	read_kernel(&file, 8, (void *)(array + fd * 8));
	learned_file.update(&zero, &file);
	return 0;
}
#else
static __always_inline u32 aside_flags(u64 task, u64 source, u64 destination)
{
	return 0;
}
#endif

#if OWNED
/*
 * Whether a task has no more rights than the user whom the traces are for. exec of a set-user-ID
 * program, or of one with capabilities, gives it others (commit_creds(), kernel/cred.c).
 */
static __always_inline bool is_owners(u64 task)
{
	u64 cred = read64(task + TASK_CRED);
	u32 gid = read32(cred + CRED_GID);

	return (u32)read32(cred + CRED_UID) == OWNER && (u32)read32(cred + CRED_EUID) == OWNER &&
	       (u32)read32(cred + CRED_SUID) == OWNER && (u32)read32(cred + CRED_EGID) == gid &&
	       (u32)read32(cred + CRED_SGID) == gid && !read64(cred + CRED_PERMITTED);
}
#endif
