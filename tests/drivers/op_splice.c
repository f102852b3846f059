// SPDX-License-Identifier: MIT
/* splice, tee, vmsplice, sendfile and copy_file_range. */
#define _GNU_SOURCE
#include "driver.h"

#include <fcntl.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t transfer(const struct endpoint *source, const struct endpoint *sink, size_t size,
			 unsigned int flags);

struct how {
	transfer *transfer;
};

static ssize_t do_splice(const struct endpoint *source, const struct endpoint *sink, size_t size,
			 unsigned int flags)
{
	return splice(source->fd, NULL, sink->fd, NULL, size,
		      flags & FLAG_MOVE ? SPLICE_F_MOVE : 0);
}

static ssize_t do_tee(const struct endpoint *source, const struct endpoint *sink, size_t size,
		      unsigned int flags)
{
	(void)flags;
	return tee(source->fd, sink->fd, size, 0);
}

static ssize_t do_sendfile(const struct endpoint *source, const struct endpoint *sink, size_t size,
			   unsigned int flags)
{
	(void)flags;
	return sendfile(sink->fd, source->fd, NULL, size);
}

static ssize_t do_copy_file_range(const struct endpoint *source, const struct endpoint *sink,
				  size_t size, unsigned int flags)
{
	(void)flags;
	return copy_file_range(source->fd, NULL, sink->fd, NULL, size, 0);
}

static void run_relay(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint source, sink;
	ssize_t moved;

	open_source(&source, options);
	open_sink(&sink, options);
	for (long i = 0; i < options->count; i++) {
		feed(&source, options->size);
		moved = carried(op->name, source.kind, sink.kind,
				how->transfer(&source, &sink, options->size, options->flags));
		drain(&sink, (size_t)moved);
		if (how->transfer == do_tee)
			take(source.fd, source.kind, options->size);
	}
}

static void vmsplice_out(const struct options *options)
{
	struct endpoint sink;

	open_sink(&sink, options);
	for (long i = 0; i < options->count; i++) {
		struct iovec vec = {buffer(), options->size};
		ssize_t sent =
			vmsplice(sink.fd, &vec, 1, options->flags & FLAG_GIFT ? SPLICE_F_GIFT : 0);

		drain(&sink, (size_t)carried("vmsplice", USER_MEMORY, sink.kind, sent));
	}
}

static void vmsplice_in(const struct options *options)
{
	struct endpoint source;

	open_source(&source, options);
	for (long i = 0; i < options->count; i++) {
		struct iovec vec = {buffer(), options->size};

		feed(&source, options->size);
		carried("vmsplice", source.kind, USER_MEMORY, vmsplice(source.fd, &vec, 1, 0));
	}
}

static void run_vmsplice(const struct operation *op, const struct options *options)
{
	(void)op;
	if (options->from)
		vmsplice_in(options);
	else
		vmsplice_out(options);
}

#define RELAY(name, from, to)                                                                      \
	{                                                                                          \
#name, run_relay, from, to, &(const struct how)                                    \
		{                                                                                  \
			do_##name                                                                  \
		}                                                                                  \
	}

const struct operation splice_operations[] = {
	RELAY(splice, "file", "pipe"),
	RELAY(tee, "pipe", "pipe"),
	RELAY(sendfile, "file", "tcp"),
	RELAY(copy_file_range, "file", "file"),
	{"vmsplice", run_vmsplice, NULL, "pipe", NULL},
	{0},
};
