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
	u64 sent;
	u32 end_seq; /* retransmissions are not counted again */
	u32 has_seq;
};

/* A flow may be fed by calls of several kinds. */
struct wish_key {
	struct flow_key flow;
	struct key tally;
};

struct wish {
	u64 expected;
	u64 legs; /* bit n: leg n is proven by what is sent */
};

#if HAVE_NETWORK && IDENTITY
BPF_TABLE("lru_hash", struct flow_key, struct flow, flows, MAX_FLOWS);
BPF_TABLE("lru_hash", struct wish_key, struct wish, wishes, MAX_FLOWS);

static __always_inline void expect_sent(struct key *key, u64 sk, u64 mapping, u64 bytes, u32 legs)
{
	struct wish_key where = {.flow = {.sk = sk, .mapping = mapping}, .tally = *key};
	struct wish none = {.legs = legs}, *wish;
	struct flow empty = {};

	where.flow.hash = read32(sk + SOCK_HASH);
	flows.lookup_or_try_init(&where.flow, &empty);
	wish = wishes.lookup_or_try_init(&where, &none);
	if (wish)
		__sync_fetch_and_add(&wish->expected, bytes);
}
#endif
