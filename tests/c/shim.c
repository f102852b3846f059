/* SPDX-License-Identifier: MIT */
/* See shim.h. io_uring's reads themselves are the kernel's: only starting them can fail here. */
#define _GNU_SOURCE
#include "shim.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

static struct fault armed;
static unsigned long calls, struck;
static const char *victim = "";
static int victim_fd = -1, spared_source = -1, spared_consumer = -1;
static bool inside;
static void (*event)(void);

void shim_arm(const struct fault *fault)
{
	armed = *fault;
	calls = struck = 0;
	victim = "";
	victim_fd = -1;
}

void shim_disarm(void)
{
	armed.kind = FAULT_NONE;
}

void shim_event(void (*happens)(void))
{
	event = happens;
}

void shim_enter(void)
{
	inside = true;
}

void shim_leave(void)
{
	inside = false;
}

void shim_around(bool before)
{
	if (before)
		shim_enter();
	else
		shim_leave();
}

void shim_spare(int source, int consumer)
{
	spared_source = source;
	spared_consumer = consumer;
}

unsigned long shim_struck(void)
{
	return struck;
}

const char *shim_victim(void)
{
	return victim;
}

int shim_victim_fd(void)
{
	return victim_fd;
}

static bool strikes(const char *name, int fd)
{
	calls++;
	if (calls != armed.at && !(armed.persists && calls > armed.at))
		return false;
	struck++;
	victim = name;
	victim_fd = fd;
	return true;
}

/* Whether this call is to fail; errno is set then. */
static bool fails(const char *name, int fd)
{
	if (!inside || (armed.kind != FAULT_ERROR && armed.kind != FAULT_EVENT) ||
	    !strikes(name, fd))
		return false;
	if (armed.kind == FAULT_EVENT) {
		inside = false;
		event();
		inside = true;
		return false;
	}
	errno = armed.error;
	return true;
}

/* How many of len bytes this call is to move. */
static size_t cut(const char *name, int from, int to, size_t len)
{
	if (!inside || (armed.kind != FAULT_ONE && armed.kind != FAULT_HALF) || len < 2 ||
	    (from >= 0 && from == spared_source) || (to >= 0 && to == spared_consumer) ||
	    !strikes(name, -1))
		return len;
	return armed.kind == FAULT_ONE ? 1 : len / 2;
}

#define WRAP(result, name, parameters)                                                             \
	result __real_##name parameters;                                                           \
	result __wrap_##name parameters;                                                           \
	result __wrap_##name parameters

WRAP(ssize_t, splice,
     (int fd_in, off64_t *off_in, int fd_out, off64_t *off_out, size_t len, unsigned int flags))
{
	if (fails("splice", fd_out))
		return -1;
	return __real_splice(fd_in, off_in, fd_out, off_out, cut("splice", fd_in, fd_out, len),
			     flags);
}

WRAP(ssize_t, tee, (int fd_in, int fd_out, size_t len, unsigned int flags))
{
	if (fails("tee", fd_out))
		return -1;
	return __real_tee(fd_in, fd_out, cut("tee", fd_in, fd_out, len), flags);
}

WRAP(ssize_t, vmsplice, (int fd, const struct iovec *vector, size_t nr, unsigned int flags))
{
	struct iovec part = *vector;

	if (fails("vmsplice", fd))
		return -1;
	/* Again and again it would use up the slots of the pipe, one for each part. */
	if (!armed.persists)
		part.iov_len = cut("vmsplice", -1, fd, part.iov_len);
	return nr == 1 ? __real_vmsplice(fd, &part, 1, flags)
		       : __real_vmsplice(fd, vector, nr, flags);
}

WRAP(ssize_t, read, (int fd, void *memory, size_t len))
{
	return fails("read", fd) ? -1 : __real_read(fd, memory, cut("read", fd, -1, len));
}

WRAP(ssize_t, pread, (int fd, void *memory, size_t len, off_t offset))
{
	return fails("pread", fd) ? -1
				  : __real_pread(fd, memory, cut("pread", fd, -1, len), offset);
}

WRAP(ssize_t, recv, (int fd, void *memory, size_t len, int flags))
{
	/* Short, it would cut messages: streams alone give the rest later. */
	return fails("recv", fd) ? -1 : __real_recv(fd, memory, len, flags);
}

WRAP(ssize_t, write, (int fd, const void *memory, size_t len))
{
	return fails("write", fd) ? -1 : __real_write(fd, memory, len);
}

WRAP(ssize_t, writev, (int fd, const struct iovec *vector, int nr))
{
	return fails("writev", fd) ? -1 : __real_writev(fd, vector, nr);
}

WRAP(int, pipe2, (int ends[2], int flags))
{
	return fails("pipe2", -1) ? -1 : __real_pipe2(ends, flags);
}

WRAP(int, open, (const char *path, int flags, ...))
{
	va_list more;
	int mode;

	va_start(more, flags);
	mode = va_arg(more, int);
	va_end(more);
	return fails("open", -1) ? -1 : __real_open(path, flags, mode);
}

WRAP(int, fcntl, (int fd, int command, ...))
{
	va_list more;
	long argument;

	va_start(more, command);
	argument = va_arg(more, long);
	va_end(more);
	return fails("fcntl", fd) ? -1 : __real_fcntl(fd, command, argument);
}

WRAP(int, ioctl, (int fd, unsigned long request, ...))
{
	va_list more;
	void *argument;

	va_start(more, request);
	argument = va_arg(more, void *);
	va_end(more);
	return fails("ioctl", fd) ? -1 : __real_ioctl(fd, request, argument);
}

WRAP(int, close, (int fd))
{
	/* Linux closes, whatever close(2) returns. */
	int done = __real_close(fd);

	return fails("close", -1) ? -1 : done;
}

WRAP(int, fstat, (int fd, struct stat *status))
{
	return fails("fstat", fd) ? -1 : __real_fstat(fd, status);
}

WRAP(int, fstatfs, (int fd, struct statfs *filesystem))
{
	return fails("fstatfs", fd) ? -1 : __real_fstatfs(fd, filesystem);
}

WRAP(int, statx,
     (int fd, const char *restrict path, int flags, unsigned int mask,
      struct statx *restrict status))
{
	return fails("statx", fd) ? -1 : __real_statx(fd, path, flags, mask, status);
}

WRAP(off_t, lseek, (int fd, off_t offset, int whence))
{
	/* Where a file has told its position it cannot refuse to move it on. */
	return !offset && fails("lseek", fd) ? -1 : __real_lseek(fd, offset, whence);
}

WRAP(int, fallocate, (int fd, int mode, off_t offset, off_t len))
{
	return fails("fallocate", fd) ? -1 : __real_fallocate(fd, mode, offset, len);
}

WRAP(int, ftruncate, (int fd, off_t length))
{
	return fails("ftruncate", fd) ? -1 : __real_ftruncate(fd, length);
}

WRAP(int, getsockopt, (int fd, int level, int name, void *restrict value, socklen_t *restrict size))
{
	return fails("getsockopt", fd) ? -1 : __real_getsockopt(fd, level, name, value, size);
}

WRAP(int, poll, (struct pollfd * fds, nfds_t nr, int timeout))
{
	return fails("poll", -1) ? -1 : __real_poll(fds, nr, timeout);
}

WRAP(void *, mmap, (void *address, size_t len, int protection, int flags, int fd, off_t offset))
{
	return fails("mmap", -1) ? MAP_FAILED
				 : __real_mmap(address, len, protection, flags, fd, offset);
}

WRAP(int, madvise, (void *address, size_t len, int advice))
{
	return fails("madvise", -1) ? -1 : __real_madvise(address, len, advice);
}

WRAP(void *, calloc, (size_t nr, size_t size))
{
	return armed.error == ENOMEM && fails("calloc", -1) ? NULL : __real_calloc(nr, size);
}

#ifdef HAVE_LIBURING
#include <liburing.h>

WRAP(int, io_uring_queue_init, (unsigned int entries, struct io_uring *ring, unsigned int flags))
{
	return fails("io_uring_queue_init", -1) ? -armed.error
						: __real_io_uring_queue_init(entries, ring, flags);
}

WRAP(int, io_uring_submit_and_wait, (struct io_uring * ring, unsigned int nr))
{
	return fails("io_uring_submit_and_wait", -1) ? -armed.error
						     : __real_io_uring_submit_and_wait(ring, nr);
}
#endif
