/* SPDX-License-Identifier: MIT */
/*
 * The consumer is a file in memory (memfd, tmpfs, hugetlbfs): the source fills the file's own
 * pages through a mapping, which O_DIRECT turns into DMA.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#define WINDOW	   (16UL << 20) /* bytes mapped at a time: eight huge pages */
#define PIECE	   (512UL << 10)
#define MAX_PIECES (WINDOW / PIECE)
#define UNTOLD	   (1 << 20)   /* bytes of a socket of a kind that does not know FIONREAD */
#define RING_WORTH (2 * PIECE) /* bytes from which several reads at a time are quicker */

bool is_memory_file(int fd)
{
	struct statfs filesystem;

	if (fstatfs(fd, &filesystem))
		return false;
	switch ((unsigned long)filesystem.f_type) {
	case TMPFS_MAGIC:
	case HUGETLBFS_MAGIC:
		return true;
	}
	return false;
}

int target_open(struct target *target, const struct call *call, const int64_t *offset)
{
	struct stat status;
	struct statfs filesystem;
	int mode = fcntl(call->fd_out, F_GETFL);

	*target = (struct target){.fd = call->fd_out, .unit = RSPLICE_PAGE};
	if (fstat(call->fd_out, &status) || fstatfs(call->fd_out, &filesystem))
		return -errno;
	if ((mode & O_ACCMODE) != O_RDWR)
		return -EBADF; /* a shared mapping that is written needs both */
	if (mode & O_APPEND ||
	    (status.st_ino == call->source.inode && status.st_dev == call->source.device))
		return -EINVAL;
	if (filesystem.f_type == HUGETLBFS_MAGIC)
		target->unit = (size_t)filesystem.f_bsize;
	target->size = status.st_size;
	target->positioned = !offset;
	if (offset) {
		target->offset = *offset;
		return 0;
	}
	target->held = (struct held){status.st_dev, status.st_ino, true, NULL};
	position_hold(&target->held);
	target->offset = lseek(target->fd, 0, SEEK_CUR);
	if (target->offset < 0 || fstat(target->fd, &status)) {
		int error = errno;

		position_release(&target->held);
		return -error;
	}
	target->size = status.st_size; /* as those before left it */
	return 0;
}

void target_close(struct target *target, ssize_t done)
{
	if (!target->positioned)
		return;
	if (done > 0)
		lseek(target->fd, (off_t)done, SEEK_CUR);
	position_release(&target->held);
}

/* Room for size bytes at the offset: allocated now, so that a full disk is told now. */
static int grow(struct target *target, int64_t offset, size_t size)
{
	int64_t start = (int64_t)round_down((uint64_t)offset, target->unit);
	uint64_t need = (uint64_t)offset + size;
	struct stat status;
	int64_t end;

	if (target->unit > RSPLICE_PAGE)
		need = round_up(need, target->unit);
	if (need > INT64_MAX)
		return -EFBIG;
	end = (int64_t)need;
	if (fstat(target->fd, &status))
		return -errno;
	while (fallocate(target->fd, 0, start, end - start)) {
		if (errno != EINTR)
			return -errno;
	}
	if (status.st_size < end) {
		/* What the file had until now is not ours to take back. */
		if (status.st_size != target->grown)
			target->size = status.st_size;
		target->grown = end;
	}
	return 0;
}

void target_shrink(const struct target *target, size_t done)
{
	int64_t end = done ? target->offset + (int64_t)done : 0;
	struct stat status;

	if (end < target->size)
		end = target->size;
	if (target->unit > RSPLICE_PAGE)
		end = (int64_t)round_up((uint64_t)end, target->unit);
	/* Only what we grew it to: behind that others have filled it meanwhile. */
	if (!fstat(target->fd, &status) && status.st_size == target->grown && end < target->grown &&
	    ftruncate(target->fd, end))
		return; /* sealed meanwhile: the zeros stay */
}

size_t direct_span(const struct source *source, const char *memory, size_t len)
{
	size_t left = source_left(source, len);

	if (!fills_directly(source) || source->offset % source->offset_align ||
	    (uintptr_t)memory % source->memory_align)
		return 0;
	/* No block beyond the end: what lies there on the disk is nobody's to see. */
	return round_down(left, source->offset_align);
}

/* How many bytes to copy until the device can go on, at most len. */
static size_t copied_span(const struct source *source, const char *memory, size_t len)
{
	size_t gap;

	if (!fills_directly(source))
		return len;
	gap = round_up((uint64_t)source->offset, source->offset_align) - (uint64_t)source->offset;
	if (!gap || gap >= len || ((uintptr_t)memory + gap) % source->memory_align)
		return len;
	return gap;
}

/*
 * Bytes up to the first piece that was short, 0 if that is the first. What others have read behind
 * it is cleared: the caller is not told of it.
 */
static size_t add_up(const struct piece *pieces, unsigned int nr, int *error)
{
	bool ended = false;
	size_t done = 0;
	unsigned int i;

	for (i = 0; i < nr; i++) {
		size_t got = pieces[i].got > 0 ? (size_t)pieces[i].got : 0;

		if (ended) {
			memset(pieces[i].memory, 0, got);
			continue;
		}
		done += got;
		ended = got < pieces[i].size;
		if (pieces[i].got < 0 && !*error)
			*error = (int)pieces[i].got;
	}
	return done;
}

/* Several reads at a time. Bytes, or -errno if there are none. */
static ssize_t read_pieces(const struct source *source, char *memory, size_t size)
{
	struct piece pieces[MAX_PIECES];
	unsigned int nr = 0;
	size_t at, done;
	int error;

	for (at = 0; at < size; at += PIECE, nr++) {
		size_t part = size - at < PIECE ? size - at : PIECE;

		pieces[nr] = (struct piece){source->direct, memory + at, part,
					    source->offset + (int64_t)at, 0};
	}
	error = ring_read(pieces, nr);
	done = add_up(pieces, nr, &error);
	return done ? (ssize_t)done : error;
}

static ssize_t read_directly(const struct source *source, char *memory, size_t size)
{
	ssize_t got = -ENOSYS;

	if (size >= RING_WORTH)
		got = read_pieces(source, memory, size);
	if (got == -ENOSYS) {
		got = pread(source->direct, memory, size, source->offset);
		got = got < 0 ? -errno : got;
	}
	/* The file was cut short meanwhile: what the device put behind its end is not to be seen.
	 */
	if (got >= 0 && (size_t)got < size)
		memset(memory + got, 0, size - (size_t)got);
	return got;
}

static uint32_t why_not_direct(const struct source *source, const char *memory)
{
	if (source->kind == SOURCE_GENERATED)
		return RSPLICE_WHY_GENERATED;
	if (source->kind != SOURCE_FILE)
		return source->kind == SOURCE_PIPE ? RSPLICE_WHY_PIPE : RSPLICE_WHY_SOCKET;
	if (!fills_directly(source))
		return RSPLICE_WHY_NO_DIRECT;
	return source->offset % source->offset_align || (uintptr_t)memory % source->memory_align
		       ? RSPLICE_WHY_ALIGNMENT
		       : RSPLICE_WHY_PARTIAL;
}

void count_direct(struct call *call, size_t size)
{
	bool certain = call->source.certain;

	if (certain)
		call->result.direct += size;
	else
		call->result.unknown += size;
	rsplice_probe_fill(call->id, (int64_t)size,
			   certain ? RSPLICE_HOW_DIRECT : RSPLICE_HOW_UNKNOWN);
}

static ssize_t fill_memory_directly(struct call *call, char *memory, size_t span)
{
	struct source *source = &call->source;
	ssize_t got = read_directly(source, memory, span);

	if (got == -EINVAL) {
		if (source->direct != source->fd)
			close(source->direct);
		source->direct = -1;
		return wants(call, RSPLICE_F_STRICT) ? -EOPNOTSUPP : -EAGAIN;
	}
	if (got > 0)
		count_direct(call, (size_t)got);
	return got;
}

static ssize_t fill_memory_by_copy(struct call *call, char *memory, size_t span)
{
	struct source *source = &call->source;
	uint32_t why = why_not_direct(source, memory);
	bool made = source->kind == SOURCE_GENERATED;
	ssize_t got;

	if (wants(call, RSPLICE_F_STRICT))
		return -EOPNOTSUPP;
	got = source_read(source, memory, span);
	if (got > 0) {
		rsplice_probe_fill(call->id, got, made ? RSPLICE_HOW_GENERATED : RSPLICE_HOW_COPY);
		count_copied(call, (size_t)got, why);
	}
	return got;
}

ssize_t fill_window(struct call *call, char *memory, size_t len)
{
	struct source *source = &call->source;
	size_t done = 0;

	while (done < len) {
		char *to = memory + done;
		size_t span = direct_span(source, to, len - done);
		ssize_t got = 0;

		if (span) {
			got = fill_memory_directly(call, to, span);
			if (got == -EAGAIN && !fills_directly(source))
				continue; /* by copying: there is no O_DIRECT any more */
		} else {
			got = fill_memory_by_copy(call, to, copied_span(source, to, len - done));
		}
		if (got <= 0)
			return done ? (ssize_t)done : got;
		done += (size_t)got;
		source->offset += got;
		if (!source_seekable(source))
			break;
	}
	return (ssize_t)done;
}

/* What the source has now, so that the file need not grow for what never comes. */
static size_t available(const struct source *source, size_t len)
{
	int ready = 0;

	if (source_seekable(source))
		return source_left(source, len);
	if (ioctl(source->fd, FIONREAD, &ready))
		ready = UNTOLD;
	else if (ready <= 0)
		ready = 1; /* the end, or an error: reading tells */
	return (size_t)ready < len ? (size_t)ready : len;
}

int target_map(struct target *target, size_t done, size_t len)
{
	int64_t offset = target->offset + (int64_t)done;
	int64_t base = (int64_t)round_down((uint64_t)offset, target->unit);
	size_t head = (size_t)(offset - base);
	int error = grow(target, offset, len);

	if (error)
		return error;
	target->span = round_up(head + len, target->unit);
	target->map =
		mmap(NULL, target->span, PROT_READ | PROT_WRITE, MAP_SHARED, target->fd, base);
	if (target->map == MAP_FAILED) {
		error = -errno;
		target_shrink(target, done);
		return error;
	}
	target->memory = target->map + head;
	return 0;
}

void target_unmap(struct target *target)
{
	munmap(target->map, target->span);
}

static ssize_t map_and_fill(struct call *call, struct target *target, size_t done, size_t len)
{
	ssize_t got;
	int error = target_map(target, done, len);

	if (error)
		return error;
	got = fill_window(call, target->memory, len);
	target_unmap(target);
	return got;
}

/* Bytes of a socket or pipe that a call before took and could not deliver. */
static ssize_t copy_carried(struct call *call, struct target *target, struct own_pipe *pipe,
			    size_t len)
{
	ssize_t done;
	int error;

	if (len > pipe->queued)
		len = pipe->queued;
	error = target_map(target, 0, len);
	if (error) {
		done = error;
	} else {
		done = read(pipe->reader, target->memory, len);
		if (done < 0)
			done = -errno;
		target_unmap(target);
		if (done < (ssize_t)len)
			target_shrink(target, done > 0 ? (size_t)done : 0);
	}
	if (done > 0) {
		pipe->queued -= (size_t)done;
		count_copied(call, (size_t)done, RSPLICE_WHY_PIPE);
	}
	carry_put(&call->source, pipe);
	return done;
}

static ssize_t fill_what_is_there(struct call *call, struct target *target, size_t len)
{
	struct source *source = &call->source;
	size_t done = 0;
	ssize_t got = 0;

	len = available(source, len);
	while (done < len) {
		got = map_and_fill(call, target, done, len - done < WINDOW ? len - done : WINDOW);
		if (got <= 0)
			break;
		done += (size_t)got;
		if (!source_seekable(source))
			break;
	}
	if (done < len || got < 0)
		target_shrink(target, done);
	return done ? (ssize_t)done : got;
}

static ssize_t fill_target(struct call *call, struct target *target, size_t len)
{
	struct source *source = &call->source;
	struct own_pipe *carried = carry_take(source);
	ssize_t got;

	if (carried)
		return copy_carried(call, target, carried, len);
	do {
		int error = source_wait(source, wants(call, RSPLICE_F_NONBLOCK));

		if (error)
			return error;
		got = fill_what_is_there(call, target, len);
	} while (got == -EAGAIN && !source_seekable(source)); /* another was quicker */
	return got;
}

ssize_t into_memory(struct call *call, int64_t *off_out, size_t len)
{
	struct target target;
	ssize_t done;
	int error = target_open(&target, call, off_out);

	if (error)
		return error;
	done = fill_target(call, &target, len);
	target_close(&target, done);
	if (done > 0 && off_out)
		*off_out += done;
	return done;
}
