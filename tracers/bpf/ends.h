// SPDX-License-Identifier: GPL-2.0-only
/*
 * The two ends of a leg. An end is one word: a class in the top byte, or the address of the
 * filesystem's struct file_system_type (its top byte is 0xff), with bit 0 set where the mount is
 * the kernel's own (that is how a memfd differs from a file on a tmpfs).
 */
#define END(class, value) ((u64)(class) << 56 | (value))
#define END_UNKNOWN	  END(1, 0)
#define END_USER	  END(2, 0)
#define END_PIPE	  END(3, 0)
#define END_FIFO	  END(4, 0)
#define END_CHAR(dev)	  END(5, dev)
#define END_BLOCK	  END(6, 0)
#define END_UBLK_DISK	  END(6, 1)
#define END_SOCKET(family, type, protocol)                                                         \
	END(7, (u64)(family) << 40 | (u64)(type) << 32 | (protocol))
/* Memory of the kernel in a ring's table of buffers: what lets go of it tells whose it is. */
#define END_REGISTERED(release) END(8, (release) << 8 >> 8)
#define END_PASSTHROUGH		END(9, 0)
#define END_IS_FILESYSTEM(end)	((end) >> 56 == 0xff)
#define END_IS_SOCKET(end)	((end) >> 56 == 7)
#define END_IS_MEMORY(end)	((end) == END_USER || (end) >> 56 == 8)
#define END_IS_PIPE(end)	((end) == END_PIPE || (end) == END_FIFO)

#define S_IFMT		 0170000
#define S_IFSOCK	 0140000
#define S_IFREG		 0100000
#define S_IFBLK		 0060000
#define S_IFCHR		 0020000
#define S_IFIFO		 0010000
#define O_DIRECT	 040000
#define FMODE_WRITE	 2
#define S_DAX		 (1 << 13)
#define SB_KERNMOUNT	 (1 << 22)
#define PIPEFS_MAGIC	 0x50495045
#define FUSE_SUPER_MAGIC 0x65735546
#define FOPEN_DIRECT_IO	 1

#define FUSE_DEVICE	(10 << 20 | 229)
#define END_FUSE_DEVICE END_CHAR(FUSE_DEVICE)

struct end {
	u64 id;
	u64 file;
	u64 inode;
	u32 direct;
	u32 dax;
};

/* A task's struct fdtable. */
static __always_inline u64 files_of(u64 task)
{
	return read64(read64(task + TASK_FILES) + FILES_FDT);
}

/* The struct file behind a descriptor, 0 if there is none. */
static __always_inline u64 file_in(u64 table, u32 fd)
{
	u64 seen = look_at(table);

	if (fd >= (u32)seen32(seen, FDT_MAX))
		return 0;
	return read64(seen64(seen, FDT_FD) + (u64)fd * 8);
}

static __always_inline u64 file_of(u64 task, u32 fd)
{
	return file_in(files_of(task), fd);
}

static __always_inline u64 socket_end(u64 file)
{
	u64 sk = read64(read64(file + FILE_PRIVATE) + SOCKET_SK);

	return END_SOCKET(read16(sk + SOCK_FAMILY), read16(sk + SOCK_TYPE),
			  read16(sk + SOCK_PROTOCOL));
}

/* Stands for a file where an end is user memory. */
#define USER_MEMORY 1

/*
 * A file of FUSE: one that its server opened with FOPEN_DIRECT_IO has no page cache, like O_DIRECT;
 * else the kernel may read and write another file in its place (fuse_file_read_iter()).
 */
static __always_inline void look_at_fuse(struct end *end, u64 file)
{
#if HAVE_FUSE
	u64 private = read64(file + FILE_PRIVATE);

	if (read32(private + FUSE_FILE_FLAGS) & FOPEN_DIRECT_IO)
		end->direct = 1;
#if FUSE_PASSTHROUGH
	else if (read64(private + FUSE_FILE_BACKING))
		end->id = END_PASSTHROUGH;
#endif
#endif
}

/* A disk whose requests a server of ublk answers: by its name, as long as it is open. */
static __always_inline bool is_ublk_disk(u64 file)
{
#if HAVE_DISK
	u64 inode = read64(read64(file + FILE_MAPPING) + MAPPING_HOST), name;

	name = read64(read64(inode - BDEV_INODE + BDEV_DISK) + DISK_NAME);
	return (name & 0xffffffffff) == 0x626b6c6275; /* "ublkb" */
#else
	return false;
#endif
}

static __always_inline void fill_end(struct end *end, u64 file)
{
	u64 sb;
	u32 mode;

	end->id = file == USER_MEMORY ? END_USER : END_UNKNOWN;
	end->file = file;
	end->direct = end->dax = 0;
	if (file <= USER_MEMORY)
		return;
	end->inode = read64(file + FILE_INODE);
	mode = read16(end->inode + INODE_MODE) & S_IFMT;
	sb = read64(end->inode + INODE_SB);
	if (mode == S_IFIFO) {
		end->id = read64(sb + SB_MAGIC) == PIPEFS_MAGIC ? END_PIPE : END_FIFO;
		return;
	}
	if (mode == S_IFSOCK) {
		end->id = socket_end(file);
		return;
	}
	if (mode == S_IFCHR) {
		end->id = END_CHAR((u32)read32(end->inode + INODE_RDEV));
		return;
	}
	end->direct = (read32(file + FILE_FLAGS) & O_DIRECT) != 0;
	if (mode == S_IFBLK) {
		end->id = is_ublk_disk(file) ? END_UBLK_DISK : END_BLOCK;
		return;
	}
	end->dax = (read32(end->inode + INODE_FLAGS) & S_DAX) != 0;
	end->id = read64(sb + SB_TYPE) | ((read64(sb + SB_FLAGS) & SB_KERNMOUNT) != 0);
	if (read64(sb + SB_MAGIC) == FUSE_SUPER_MAGIC && mode == S_IFREG)
		look_at_fuse(end, file);
}

/* Keeps the name of a filesystem for the reader. Called once per new key. */
static __always_inline void remember_name(u64 end)
{
	struct name name = {};
	u64 type = end & ~1ULL;

	if (!END_IS_FILESYSTEM(end))
		return;
	read_kernel_string(name.text, sizeof(name.text), (void *)read64(type + FSTYPE_NAME));
	filesystem_names.update(&type, &name);
}
