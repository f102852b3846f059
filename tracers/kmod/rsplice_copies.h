/* SPDX-License-Identifier: GPL-2.0-only */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM rsplice

#if !defined(RSPLICE_COPIES_H) || defined(TRACE_HEADER_MULTI_READ)
#define RSPLICE_COPIES_H

#include <linux/tracepoint.h>

/* A copy of *bytes* to or from an iterator is done: BPF's arguments are in this order. */
TRACE_EVENT(rsplice_copied,
	TP_PROTO(unsigned long to_iterator, unsigned long bytes),
	TP_ARGS(to_iterator, bytes),
	TP_STRUCT__entry(
		__field(unsigned long, to_iterator)
		__field(unsigned long, bytes)
	),
	TP_fast_assign(
		__entry->to_iterator = to_iterator;
		__entry->bytes = bytes;
	),
	TP_printk("%s %lu", __entry->to_iterator ? "to" : "from", __entry->bytes)
);

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE rsplice_copies
#include <trace/define_trace.h>
