// SPDX-License-Identifier: GPL-2.0-only
/*
 * What sockets send. The kernel may transmit long after a call returned, so both sides only add
 * up: calls say how many bytes of which page cache they gave to a socket, transmissions how many
 * left it. The reader takes the smaller of both.
 */
struct flow_key {
	u64 sk;
	u64 mapping;
	u64 hash; /* of the connection: tells a reused struct sock from the old one */
};

struct flow {
	struct key key; /* the tally that the bytes belong to */
	u64 expected;
	u64 sent;
	u32 legs;    /* bit n: leg n is proven by what is sent */
	u32 end_seq; /* retransmissions are not counted again */
	u32 has_seq;
	u32 pad;
};

#if HAVE_NETWORK && IDENTITY
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, MAX_FLOWS);

static __always_inline struct flow *flow_of(u64 sk, u64 mapping)
{
	struct flow_key key = {.sk = sk, .mapping = mapping};
	struct flow empty = {};

	key.hash = read32(sk + SOCK_HASH);
	return flows.lookup_or_try_init(&key, &empty);
}

static __always_inline void expect_sent(struct key *key, u64 sk, u64 mapping, u64 bytes, u32 legs)
{
	struct flow *flow = flow_of(sk, mapping);

	if (!flow)
		return;
	flow->key = *key;
	flow->legs = legs;
	__sync_fetch_and_add(&flow->expected, bytes);
}
#endif
