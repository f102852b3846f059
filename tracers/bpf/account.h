// SPDX-License-Identifier: GPL-2.0-only
/* Adding a call to the tally of its kind. */

/*
 * Lives in a map, not on the stack: what is loaded from a map is unknown to the verifier, so that
 * the many kinds of ends are not followed one by one to the end of the program. Raw tracepoints
 * run with preemption off, and none of ours interrupts another of the same kind.
 */
struct call {
	u64 process;
	struct end source;
	struct end destination;
	u64 bytes;
	u32 via;
	u32 flags;
};

BPF_TABLE("percpu_array", u32, struct call, calls, 1);
BPF_TABLE("percpu_array", u32, struct call, uring_calls, 1);

/* Makes the compiler load a call's members anew. */
#define forget() asm volatile("" ::: "memory")

static __always_inline void fill_key(struct key *key, struct call *call)
{
	key->process = call->process;
	key->source = call->source.id;
	key->destination = call->destination.id;
	key->via = call->via;
	key->flags = call->flags | (call->source.direct ? F_SRC_DIRECT : 0) |
		     (call->source.dax ? F_SRC_DAX : 0) |
		     (call->destination.direct ? F_DST_DIRECT : 0) |
		     (call->destination.dax ? F_DST_DAX : 0);
}

/* The tally of a key on this CPU, made if need be; 0 (and counted as lost) if the map is full. */
static __always_inline struct tally *tally_of(struct key *key)
{
	struct tally *tally = tallies.lookup(key);
	struct tally empty = {};
	struct process *process;

	if (tally)
		return tally;
	tallies.update(key, &empty);
	remember_name(key->source);
	remember_name(key->destination);
	/* Programs rename themselves: a new kind of call is a rare and good moment to look. */
	process = processes.lookup(&key->process);
	if (process && process->pid == bpf_get_current_pid_tgid() >> 32)
		read_kernel(process->comm, sizeof(process->comm),
			    (void *)(read64(bpf_get_current_task() + TASK_LEADER) + TASK_COMM));
	tally = tallies.lookup(key);
	if (!tally)
		count_lost(LOST_TALLY);
	return tally;
}

static __always_inline struct note *current_note(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return notes.lookup(&tid);
}
