// SPDX-License-Identifier: GPL-2.0-only
/* What leaves sockets, and what is copied out of their buffers. */

int tp_skb_copy_datagram_iovec(u64 *ctx)
{
	u64 length = (u32)tracepoint_arg(ctx, 1);
	u32 tid = bpf_get_current_pid_tgid();
	struct note *note, none = {};

	if (!current_process())
		return 0;
	note = notes.lookup_or_try_init(&tid, &none);
	if (note)
		note->copied += length;
	return 0;
}

#if HAVE_NETWORK && HAVE_IDENTITY && IDENTITY
#define MAX_SKB_FRAGS 17

struct packet {
	u64 sk;
	u64 frags;
	u32 nr_frags;
	u32 linear; /* payload in front of the fragments, bytes */
	u32 seq;    /* of the first payload byte */
	u32 tcp;
	u32 followed;
#if FINDINGS
	u64 process;
	u64 lost; /* page of a fragment that the packet does not own up to */
	u32 flags;
	u32 pad;
	struct finding_key key;
	struct facts facts;
#endif
	struct folio folio;
};

/* Not on the stack for the verifier's sake, as in account.h. Transmission has softirqs off. */
BPF_TABLE("percpu_array", u32, struct packet, packets, 1);

static __always_inline u64 frag_mapping(struct folio *folio, u64 frag)
{
	load_folio(folio, read64(frag + FRAG_PAGE) & ~3ULL);
	return folio->mapping & MAPPING_FLAGS ? 0 : folio->mapping;
}

/* struct tcphdr: seq at byte 4, the header's length in 4-byte words in the high bits of byte 12 */
static __always_inline void read_tcp(struct packet *packet, u64 skb, u64 head)
{
	u64 transport = head + read16(skb + SKB_TRANSPORT);
	u32 headlen = (u32)read32(skb + SKB_LEN) - (u32)read32(skb + SKB_DATA_LEN);
	u64 end = read64(skb + SKB_DATA) + headlen;

	packet->seq = bpf_ntohl(read32(transport + 4));
	packet->linear = end - transport - (read8(transport + 12) >> 4) * 4;
}

static __always_inline void count_sent(struct packet *packet, u64 mapping, u32 seq, u32 length)
{
	struct flow_key key = {.sk = packet->sk, .mapping = mapping};
	struct flow *flow;
	s32 news;

	key.hash = read32(packet->sk + SOCK_HASH);
	flow = flows.lookup(&key);
	if (!flow) {
		struct flow empty = {};

		if (!packet->followed)
			return;
		flow = flows.lookup_or_try_init(&key, &empty);
		if (!flow)
			return;
	}
	if (packet->tcp) {
		news = seq + length - flow->end_seq;
		if (flow->has_seq && news <= 0)
			return;
		flow->end_seq = seq + length;
		if (flow->has_seq && news < (s32)length)
			length = news;
		flow->has_seq = 1;
	}
	__sync_fetch_and_add(&flow->sent, length);
}

#if FINDINGS && SHINFO_FLAGS
/*
 * Page-cache pages leave in packets whose SKBFL_SHARED_FRAG is set (tcp_sendmsg_locked() and
 * __ip_append_data() set it, 6.5 and later): whoever changes data in place copies it first.
 */
static __always_inline void check_fragment(struct packet *packet, u64 frag, u64 mapping)
{
	if (judge_fragment(mapping, packet->flags))
		packet->lost = read64(frag + FRAG_PAGE) & ~3ULL;
}

/* One occurrence is one packet. */
static __always_inline void record_lost(struct packet *packet)
{
	if (!packet->lost || !packet->process)
		return;
	__builtin_memset(&packet->key, 0, sizeof(packet->key));
	packet->key.process = packet->process;
	packet->key.source = END_UNKNOWN;
	packet->key.destination =
		END_SOCKET(read16(packet->sk + SOCK_FAMILY), read16(packet->sk + SOCK_TYPE),
			   read16(packet->sk + SOCK_PROTOCOL));
	packet->key.name = SHARED_FRAG_LOST;
	packet->key.via = VIA_PACKET;
	packet->facts.class = CACHE_BUFFER;
	load_page_facts(&packet->facts, packet->lost);
	record(&packet->key, &packet->facts, 0);
}
#endif

int tp_net_dev_start_xmit(u64 *ctx)
{
	u64 skb = tracepoint_arg(ctx, 0), head, info;
	struct packet *packet;
	u32 i, seq, zero = 0;

	head = read64(skb + SKB_HEAD);
	info = head + read32(skb + SKB_END);
	packet = packets.lookup(&zero);
	if (!packet)
		return 0;
	packet->sk = read64(skb + SKB_SK);
	packet->nr_frags = read8(info + SHINFO_NR_FRAGS);
	packet->frags = info + SHINFO_FRAGS;
	if (!packet->sk || !packet->nr_frags)
		return 0;
	/* Copied payload is in pages of no page cache; a copied header may come first. */
	packet->folio.span = 0;
	if (!frag_mapping(&packet->folio, packet->frags) &&
	    !frag_mapping(&packet->folio, packet->frags + (packet->nr_frags - 1) * FRAG_SIZE))
		return 0;
#if FINDINGS
	packet->process = current_process();
	packet->followed = packet->process != 0;
	packet->flags = read8(info + SHINFO_FLAGS);
	packet->lost = 0;
#else
	packet->followed = current_process() != 0;
#endif
	packet->seq = packet->linear = 0;
	packet->tcp = read16(packet->sk + SOCK_PROTOCOL) == IPPROTO_TCP;
	if (packet->tcp)
		read_tcp(packet, skb, head);
	forget();
	seq = packet->seq + packet->linear;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_SKB_FRAGS; i++) {
		u64 frag = packet->frags + i * FRAG_SIZE, mapping;
		u32 length;

		if (i >= packet->nr_frags)
			break;
		length = read32(frag + FRAG_LEN);
		mapping = frag_mapping(&packet->folio, frag);
#if FINDINGS && SHINFO_FLAGS
		check_fragment(packet, frag, mapping);
#endif
		if (mapping)
			count_sent(packet, mapping, seq, length);
		seq += length;
	}
#if FINDINGS && SHINFO_FLAGS
	record_lost(packet);
#endif
	return 0;
}
#endif
