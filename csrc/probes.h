/* SPDX-License-Identifier: MIT */
/*
 * The USDT probes of librsplice, provider "rsplice". rsplice audit attaches to them, and so can
 * bpftrace, BCC and gdb. A probe that nobody is attached to costs one nop; without <sys/sdt.h>
 * there is none.
 *
 * id is the serial number of a call in its process; bytes are bytes; every argument is an int64.
 */
#ifndef RSPLICE_PROBES_H
#define RSPLICE_PROBES_H

#include <stdint.h>

#if !defined(RSPLICE_NO_PROBES) && defined(__has_include)
#if __has_include(<sys/sdt.h>)
#include <sys/sdt.h>
#endif
#endif

/* How bytes came into their pages, of rsplice_probe_fill(). */
enum rsplice_how {
	RSPLICE_HOW_DIRECT = 0,	   /* a device wrote them: O_DIRECT */
	RSPLICE_HOW_REFERENCE = 1, /* pages of the source itself: splice(2) */
	RSPLICE_HOW_COPY = 2,	   /* the CPU copied them */
	RSPLICE_HOW_GENERATED = 3, /* the CPU made them */
	RSPLICE_HOW_UNKNOWN = 4,   /* O_DIRECT of a filesystem that may copy all the same */
};

/*
 * The call number id has reserved room for len bytes. On every way out, and in the same thread,
 * rsplice_probe_publish() follows, or rsplice_probe_abort() of all len bytes: what the thread does
 * in between is taken for the call's own.
 */
static inline void rsplice_probe_reserve(int64_t id, int64_t fd_in, int64_t fd_out, int64_t len)
{
#ifdef STAP_PROBE4
	STAP_PROBE4(rsplice, reserve, id, fd_in, fd_out, len);
#else
	(void)id, (void)fd_in, (void)fd_out, (void)len;
#endif
}

/* The source has filled bytes of them; how is an enum rsplice_how. */
static inline void rsplice_probe_fill(int64_t id, int64_t bytes, int64_t how)
{
#ifdef STAP_PROBE3
	STAP_PROBE3(rsplice, fill, id, bytes, how);
#else
	(void)id, (void)bytes, (void)how;
#endif
}

/* The consumer has taken them, with the dispositions of struct rsplice_result. */
static inline void rsplice_probe_publish(int64_t id, int64_t moved, int64_t shared, int64_t direct,
					 int64_t copied, int64_t unknown)
{
#ifdef STAP_PROBE6
	STAP_PROBE6(rsplice, publish, id, moved, shared, direct, copied, unknown);
#else
	(void)id, (void)moved, (void)shared, (void)direct, (void)copied, (void)unknown;
#endif
}

/* bytes have to be copied; why is an RSPLICE_WHY_*. */
static inline void rsplice_probe_fallback(int64_t id, int64_t bytes, int64_t why)
{
#ifdef STAP_PROBE3
	STAP_PROBE3(rsplice, fallback, id, bytes, why);
#else
	(void)id, (void)bytes, (void)why;
#endif
}

/* bytes were reserved or filled, and nobody will ever see them. */
static inline void rsplice_probe_abort(int64_t id, int64_t bytes)
{
#ifdef STAP_PROBE2
	STAP_PROBE2(rsplice, abort, id, bytes);
#else
	(void)id, (void)bytes;
#endif
}

#endif /* RSPLICE_PROBES_H */
