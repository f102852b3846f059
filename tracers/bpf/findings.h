// SPDX-License-Identifier: GPL-2.0-only
/*
 * Findings: what is seen of pages that is wrong, risky or slow, added up by kind, with the first
 * occurrence of each (findings.py). docs/lifecycle.md says what they mean.
 *
 * Looked for where every call has its pages compared: a sample would count some of them.
 */
#if HAVE_FINDINGS && HAVE_IDENTITY && IDENTITY == 2
#define FINDINGS 1

struct finding_key {
	u64 process;
	u64 source;
	u64 destination;
	u32 name;
	u32 reason;
	u32 via;
	u32 pad;
};

/* Who did what a finding is about, and when. */
struct deed {
	u64 time;
	u32 pid;
	u32 pad;
	char comm[16];
};

static __always_inline void load_deed(struct deed *deed)
{
	deed->time = bpf_ktime_get_ns();
	deed->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(deed->comm, sizeof(deed->comm));
}

struct finding {
	u64 count;
	u64 first; /* bpf_ktime_get_ns() */
	u64 last;
	struct facts facts; /* of the first occurrence, as all that follows */
	u64 inode;
	u64 index; /* of the page in its file */
	u32 device;
	u32 tid;
	char file[32]; /* the last part of its path */
	struct deed deed;
	char mapper_comm[16]; /* the process that maps the page, if it is the only one */
	u32 mapper;
	u32 pad;
};
BPF_HASH(findings, struct finding_key, struct finding, MAX_FINDINGS);

/* Addresses of the tables of pipe buffer operations; findings.py learns them at start. */
struct buffer_classes {
	u64 operations[NR_CLASSES];
};
BPF_ARRAY(buffer_classes, struct buffer_classes, 1);

static __always_inline u32 class_of(struct buffer_classes *classes, u64 operations)
{
	u32 i;

#pragma unroll
	for (i = 0; i < NR_CLASSES; i++)
		if (classes->operations[i] == operations)
			return i;
	return NR_CLASSES;
}

/* @head: its first page */
static __always_inline void load_folio_facts(struct facts *facts, u64 head)
{
	facts->page = head;
	facts->moment = SNAPSHOT;
	facts->mapping = read64(head + PAGE_MAPPING);
	facts->page_flags = read64(head + PAGE_FLAGS);
	facts->references = read32(head + PAGE_REFCOUNT);
	facts->pages = pages_of(head);
	facts->mapcount = (s32)read32(head + PAGE_MAPCOUNT);
#if HAVE_MAPCOUNT
	if (facts->pages > 1)
		facts->mapcount = (s32)read32(head + FOLIO_MAPCOUNT);
#endif
	/* page_type shares the place of a single page's count, and is below -1. */
	if (facts->mapcount < 0)
		facts->mapcount = -1;
}

static __always_inline void load_page_facts(struct facts *facts, u64 page)
{
	load_folio_facts(facts, head_of(page));
	facts->page = page;
}

/* All but the class. */
static __always_inline void load_slot_facts(struct facts *facts, u64 slot)
{
	load_page_facts(facts, read64(slot + BUF_PAGE));
	facts->flags = read32(slot + BUF_FLAGS);
	facts->offset = read32(slot + BUF_OFFSET);
	facts->length = read32(slot + BUF_LEN);
}

static __always_inline void load_buffer_facts(struct facts *facts, struct buffer_classes *classes,
					      u64 slot)
{
	facts->class = class_of(classes, read64(slot + BUF_OPS));
	load_slot_facts(facts, slot);
}

/* The file of the first occurrence. */
static __always_inline void name_file(struct finding *finding, u64 inode)
{
	u64 alias = read64(inode + INODE_DENTRY);

	finding->inode = read64(inode + INODE_INO);
	finding->device = read32(read64(inode + INODE_SB) + SB_DEV);
	if (alias)
		read_kernel_string(finding->file, sizeof(finding->file),
				   (void *)read64(alias - DENTRY_ALIAS + DENTRY_NAME));
}

#if HAVE_MAPPERS
/*
 * The only mapping of memory or of a file that a page may be in a page table by; 0 where there are
 * several. Trees of vm_area_structs: vma_interval_tree_insert(), anon_vma_interval_tree_insert()
 * (mm/interval_tree.c).
 */
static __always_inline u64 only_vma(u64 mapping)
{
	bool anonymous = (mapping & MAPPING_FLAGS) == 1;
	u64 node = read64(anonymous ? mapping - 1 + ANON_VMAS : mapping + MAPPING_VMAS);

	if (!node || read64(node + NODE_LEFT) || read64(node + NODE_RIGHT))
		return 0;
	return anonymous ? read64(node - ANON_LINK_NODE + ANON_LINK_VMA) : node - VMA_FILE_NODE;
}
#endif

static __always_inline void name_mapper(struct finding *finding)
{
#if HAVE_MAPPERS
	u64 mapping = finding->facts.mapping, vma, task;

	if (finding->facts.mapcount < 0 || !mapping || (mapping & MAPPING_FLAGS) > 1)
		return;
	vma = only_vma(mapping);
	task = vma ? read64(read64(vma + VMA_MM) + MM_OWNER) : 0;
	if (!task)
		return;
	finding->mapper = read32(task + TASK_TGID);
	read_kernel(finding->mapper_comm, sizeof(finding->mapper_comm), (void *)(task + TASK_COMM));
#endif
}

/*
 * Adds occurrences.
 *
 * @inode: of the file that they are about; 0 takes the one that the page belongs to, if it does
 */
static __always_inline void record_all(struct finding_key *key, struct facts *facts, u64 inode,
				       u64 times)
{
	struct finding *known = findings.lookup(key);
	u64 now = bpf_ktime_get_ns();

	journey_found(key->name, key->reason, facts->page);
	if (!known) {
		struct finding fresh = {.first = now,
					.facts = *facts}; /* no map: see inspections */

		fresh.tid = bpf_get_current_pid_tgid();
		if (is_cache_page(facts->mapping)) {
			fresh.index = read64(head_of(facts->page) + PAGE_INDEX);
			fresh.index += (facts->page - head_of(facts->page)) / PAGE_SIZE_OF;
			if (!inode)
				inode = read64(facts->mapping + MAPPING_HOST);
		}
		if (inode)
			name_file(&fresh, inode);
		name_mapper(&fresh);
		remember_name(key->source);
		remember_name(key->destination);
		findings.insert(key, &fresh);
		known = findings.lookup(key);
		if (!known) {
			count_lost(LOST_FINDING);
			return;
		}
	}
	__sync_fetch_and_add(&known->count, times);
	known->last = now;
}

/* Of the first occurrence, which is the last one that was recorded. */
static __always_inline void name_deed(struct finding_key *key, struct deed *deed)
{
	struct finding *known = findings.lookup(key);

	if (known && !known->deed.time && known->count == 1)
		known->deed = *deed;
}

static __always_inline void record(struct finding_key *key, struct facts *facts, u64 inode)
{
	record_all(key, facts, inode, 1);
}

/* A reply to a READ, as it lies in the pipe before it goes. */
#define MAX_OFFERED (MAX_SLOTS + 1)
struct offered {
	u64 page;
	u64 mapping;
	u64 page_flags;
	u32 references;
	u32 length;
	u16 offset;
	u16 flags;
	u8 reason;
	u8 class;
	u8 pages;
	u8 mapped;
};
struct offers {
	u64 process;
	u64 bytes; /* of the reply, with its header */
	u32 nr;
	u32 ended; /* a request was answered */
	struct offered slots[MAX_OFFERED];
};
BPF_HASH(offers, u32, struct offers, MAX_OFFERS); /* by thread */
BPF_TABLE("percpu_array", u32, struct offers, offers_scratch, 1);

static __always_inline void keep_offer(struct offered *offered, struct facts *facts)
{
	offered->page = facts->page;
	offered->mapping = facts->mapping;
	offered->page_flags = facts->page_flags;
	offered->references = facts->references;
	offered->length = facts->length;
	offered->offset = facts->offset;
	offered->flags = facts->flags;
	offered->reason = why_refused(facts);
	offered->class = facts->class;
	offered->pages = facts->pages > 255 ? 255 : facts->pages;
	offered->mapped = facts->mapcount >= 0;
}

static __always_inline void recall_offer(struct facts *facts, struct offered *offered)
{
	facts->page = offered->page;
	facts->mapping = offered->mapping;
	facts->page_flags = offered->page_flags;
	facts->references = offered->references;
	facts->length = offered->length;
	facts->offset = offered->offset;
	facts->flags = offered->flags;
	facts->class = offered->class;
	facts->pages = offered->pages;
	facts->mapcount = offered->mapped ? 0 : -1;
	facts->moment = SNAPSHOT;
}

/* A pipe's ring under examination; in a map for the same reason as struct walk. */
struct inspection {
	struct finding_key key;
	u64 source; /* the struct file of the pipe, and of where its buffers go */
	u64 destination;
	u64 bufs;
	u64 bytes; /* that may be consumed */
	u64 total;
	u32 mask;
	u32 tail;
	u32 slots;
	u32 next;		     /* slot that is looked at, from the tail */
	u32 reply;		     /* goes to a FUSE device, and may be moved */
	u32 published;		     /* by librsplice, which offers it for a move */
	u32 last;		     /* thread of a process that ends */
	u32 descriptor;		     /* of a process that ends: the next one */
	u32 changed[MAX_SLOTS / 32]; /* bits: slots whose contents are not what was queued */
	struct folio folio;
	struct facts facts;
};

BPF_TABLE("percpu_array", u32, struct inspection, inspections, NR_PROGRAM_PLACES);

static __always_inline struct inspection *inspection_at(u32 place)
{
	return inspections.lookup(&place);
}

static __always_inline void inspect_pipe(struct inspection *inspection, u64 pipe)
{
	inspection->bufs = read64(pipe + PIPE_BUFS);
	inspection->mask = read32(pipe + PIPE_RING_SIZE) - 1;
	inspection->tail = pipe_index(pipe + PIPE_TAIL);
	inspection->slots = pipe_index(pipe + PIPE_HEAD) - inspection->tail;
	if (PIPE_HEAD_SIZE == 2)
		inspection->slots &= 0xffff;
}

/*
 * How far each pipe's buffers have been judged, by the number of its inode, which is not used
 * again as kernel memory is: some are looked at twice and must count once.
 */
struct judged {
	u64 bufs; /* the ring: fcntl(F_SETPIPE_SZ) replaces it, and begins anew (fs/pipe.c) */
	u64 next;
};
BPF_TABLE("lru_hash", u64, struct judged, judged, 1024);
#endif
