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
	u64 messages; /* bytes that tp_messages counted, with bit 63 set */
	u64 nr_judged;
	u32 via;
	u32 flags;
	u32 place; /* of its tally */
	u32 pad;
};

BPF_TABLE("percpu_array", u32, struct call, calls, NR_PROGRAM_PLACES);

static __always_inline struct call *call_at(u32 place)
{
	return calls.lookup(&place);
}

/* Makes the compiler load a call's members anew. */
#define forget() asm volatile("" ::: "memory")

/* A loop, so that the compiler need not make the code twice. */
static __always_inline void fill_ends(struct call *call, u64 source, u64 destination)
{
	u32 i;

#pragma clang loop unroll(disable)
	for (i = 0; i < 2; i++)
		fill_end(i ? &call->destination : &call->source, i ? destination : source);
}

static __always_inline void fill_key(struct key *key, struct call *call, u64 task)
{
	key->process = call->process;
	key->source = call->source.id;
	key->destination = call->destination.id;
	key->via = call->via;
	key->flags = call->flags | inside_flag(call->process, task) |
		     aside_flags(task, call->source.file, call->destination.file) |
		     (call->source.direct ? F_SRC_DIRECT : 0) | (call->source.dax ? F_SRC_DAX : 0) |
		     (call->destination.direct ? F_DST_DIRECT : 0) |
		     (call->destination.dax ? F_DST_DAX : 0);
}

/*
 * The tallies in use, per CPU, in front of the hash: found without a function call. Each key has
 * two places; where both are taken, the one less used goes back to the hash. The reader adds up
 * hash and places, and reads again when something moved meanwhile.
 */
#define RECENTS 256
struct recent {
	struct key key;
	struct tally tally;
};
BPF_TABLE("percpu_array", u32, struct recent, recents, RECENTS);
BPF_TABLE("percpu_array", u32, u64, nr_moved, 1);

/* The first of a key's places; the other is the next. */
static __always_inline u32 recent_index(struct key *key)
{
	u64 mix = key->process ^ key->source * 3 ^ key->destination * 5 ^ key->via * 7 ^ key->flags;

	return mix * 0x9e3779b97f4a7c15ULL >> 57 << 1; /* Fibonacci hashing, to 7 bits */
}

static __always_inline bool same_key(struct key *one, struct key *other)
{
	return one->process == other->process && one->source == other->source &&
	       one->destination == other->destination && one->via == other->via &&
	       one->flags == other->flags;
}

static __always_inline void put_back(struct recent *recent)
{
	struct tally empty = {}, *tally = tallies.lookup_or_try_init(&recent->key, &empty);
	u64 *from = (u64 *)&recent->tally, *to = (u64 *)tally, *moved;
	u32 i, zero = 0;

	if (!tally) {
		count_lost(LOST_TALLY);
		return;
	}
#pragma unroll
	for (i = 0; i < sizeof(*tally) / 8; i++)
		to[i] += from[i];
	moved = nr_moved.lookup(&zero);
	if (moved)
		*moved += 1;
}

/* Makes room in the hash for a new kind of call. Returns false if it is full. */
static __always_inline bool introduce(struct key *key)
{
	struct tally empty = {};
	struct process *process;

	if (tallies.lookup(key))
		return true;
	if (tallies.update(key, &empty)) {
		count_lost(LOST_TALLY);
		return false;
	}
	remember_name(key->source);
	remember_name(key->destination);
	/* Programs rename themselves: a new kind of call is a rare and good moment to look. */
	process = processes.lookup(&key->process);
	if (process && process->pid == bpf_get_current_pid_tgid() >> 32)
		read_kernel(process->comm, sizeof(process->comm),
			    (void *)(read64(bpf_get_current_task() + TASK_LEADER) + TASK_COMM));
	return true;
}

/* The tally at a place that tally_of() has just told, 0 if there is no such place. */
static __always_inline struct tally *tally_at(u32 place)
{
	struct recent *recent = recents.lookup(&place);

	return recent ? &recent->tally : 0;
}

/*
 * The tally of a key on this CPU, made if need be; 0 (and counted as lost) if the map is full.
 *
 * @place: where it stands
 */
static __always_inline struct tally *tally_of(struct key *key, u32 *place)
{
	u32 index = recent_index(key), next = index + 1;
	struct recent *one = recents.lookup(&index), *other = recents.lookup(&next), *older;

	if (!one || !other)
		return 0;
	*place = index;
	if (same_key(&one->key, key))
		return &one->tally;
	older = one->tally.operations < other->tally.operations ? one : other;
	if (older == other || same_key(&other->key, key))
		*place = next;
	if (same_key(&other->key, key))
		return &other->tally;
	if (!introduce(key))
		return 0;
	if (older->key.process)
		put_back(older);
	__builtin_memset(&older->tally, 0, sizeof(older->tally));
	older->key = *key;
	return &older->tally;
}

/* The kernel's own word on what became of zero-copy sends, by tally. */
struct declared {
	u64 copied;
	u64 shared;
};
BPF_TABLE("lru_hash", struct key, struct declared, declarations, 1024);

static __always_inline void declare(struct key *key, u64 bytes, bool copied)
{
	struct declared none = {}, *declared = declarations.lookup_or_try_init(key, &none);

	if (declared)
		__sync_fetch_and_add(copied ? &declared->copied : &declared->shared, bytes);
}

static __always_inline struct note *current_note(void)
{
	u32 tid = bpf_get_current_pid_tgid();

	return notes.lookup(&tid);
}
