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

/*
 * MSG_ZEROCOPY sends that wait for the kernel's notification, which names them by numbers: one a
 * call, counted from 0 on each socket (msg_zerocopy_realloc(), net/core/skbuff.c).
 */
struct send_key {
	u64 sk;
	u64 number;
};

struct sent {
	struct key tally;
	u64 bytes;
};

#if HAVE_ZEROCOPY
BPF_TABLE("lru_hash", struct send_key, struct sent, zerocopy_sends, 4096);

#define SO_EE_ORIGIN_ZEROCOPY	   5
#define SO_EE_CODE_ZEROCOPY_COPIED 1
#define MAX_NOTIFIED		   256

/* The first control message of an error queue: struct cmsghdr, struct sock_extended_err. */
struct notification {
	u64 length;
	u32 level;
	u32 type;
	u32 error;
	u8 origin;
	u8 kind;
	u8 code;
	u8 pad;
	u32 first;
	u32 last;
};

static __always_inline void await_notification(struct key *key, u64 sk, u64 bytes)
{
	struct send_key where = {.sk = sk, .number = (u32)(read32(sk + SOCK_ZCKEY) - 1)};
	struct sent sent = {.tally = *key, .bytes = bytes};

	zerocopy_sends.update(&where, &sent);
}

/* A notification that a process fetched: what it says of the sends from first to last. */
static __always_inline void take_notification(u64 sk, u64 control)
{
	struct notification news = {};
	struct send_key where = {.sk = sk};
	struct sent *sent;
	u32 i;

	if (read_user(&news, sizeof(news), (void *)control) || news.origin != SO_EE_ORIGIN_ZEROCOPY)
		return;
#pragma clang loop unroll(disable)
	for (i = 0; i < MAX_NOTIFIED; i++) {
		if (i > news.last - news.first)
			break;
		where.number = (u32)(news.first + i);
		sent = zerocopy_sends.lookup(&where);
		if (!sent)
			continue;
		declare(&sent->tally, sent->bytes, news.code & SO_EE_CODE_ZEROCOPY_COPIED);
		zerocopy_sends.delete(&where);
	}
}
#endif
