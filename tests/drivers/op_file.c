// SPDX-License-Identifier: MIT
/* The read and write families. */
#define _GNU_SOURCE
#include "driver.h"

#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t transfer(int fd, void *data, size_t size, off_t at);

struct how {
	transfer *transfer;
};

/* Two segments, of which the first has an odd length. */
static struct iovec *halves(void *data, size_t size, struct iovec vec[2])
{
	size_t first = size > 1 ? size / 2 - 1 + size % 2 : size;

	vec[0] = (struct iovec){.iov_base = data, .iov_len = first};
	vec[1] = (struct iovec){.iov_base = (char *)data + first, .iov_len = size - first};
	return vec;
}

static ssize_t do_read(int fd, void *data, size_t size, off_t at)
{
	(void)at;
	return read(fd, data, size);
}

static ssize_t do_pread64(int fd, void *data, size_t size, off_t at)
{
	return pread(fd, data, size, at);
}

static ssize_t do_readv(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	(void)at;
	return readv(fd, halves(data, size, vec), 2);
}

static ssize_t do_preadv(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	return preadv(fd, halves(data, size, vec), 2, at);
}

static ssize_t do_preadv2(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	return preadv2(fd, halves(data, size, vec), 2, at, 0);
}

static ssize_t do_write(int fd, void *data, size_t size, off_t at)
{
	(void)at;
	return write(fd, data, size);
}

static ssize_t do_pwrite64(int fd, void *data, size_t size, off_t at)
{
	return pwrite(fd, data, size, at);
}

static ssize_t do_writev(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	(void)at;
	return writev(fd, halves(data, size, vec), 2);
}

static ssize_t do_pwritev(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	return pwritev(fd, halves(data, size, vec), 2, at);
}

static ssize_t do_pwritev2(int fd, void *data, size_t size, off_t at)
{
	struct iovec vec[2];

	return pwritev2(fd, halves(data, size, vec), 2, at, 0);
}

static off_t position(const struct endpoint *end, const struct options *options, long i)
{
	if (!end->seekable)
		return -1;
	return options->offset + (off_t)i * (off_t)options->size;
}

static void run_read(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint source;

	open_source(&source, options);
	for (long i = 0; i < options->count; i++) {
		feed(&source, options->size);
		carried(op->name, source.kind, USER_MEMORY,
			how->transfer(source.fd, buffer(), options->size,
				      position(&source, options, i)));
	}
}

static void run_write(const struct operation *op, const struct options *options)
{
	const struct how *how = op->how;
	struct endpoint sink;
	ssize_t sent;

	open_sink(&sink, options);
	for (long i = 0; i < options->count; i++) {
		sent = carried(op->name, USER_MEMORY, sink.kind,
			       how->transfer(sink.fd, buffer(), options->size,
					     position(&sink, options, i)));
		drain(&sink, (size_t)sent);
	}
}

#define READ(name)                                                                                 \
	{                                                                                          \
#name, run_read, "file", NULL, &(const struct how)                                 \
		{                                                                                  \
			do_##name                                                                  \
		}                                                                                  \
	}
#define WRITE(name)                                                                                \
	{                                                                                          \
#name, run_write, NULL, "file", &(const struct how)                                \
		{                                                                                  \
			do_##name                                                                  \
		}                                                                                  \
	}

const struct operation file_operations[] = {
	READ(read),   READ(pread64),   READ(readv),   READ(preadv),   READ(preadv2),
	WRITE(write), WRITE(pwrite64), WRITE(writev), WRITE(pwritev), WRITE(pwritev2),
	{0},
};
