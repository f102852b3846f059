# SPDX-License-Identifier: MIT
"""Which kernel fields the BPF programs read, and where they lie on this kernel.

Every field has a name (a constant in the BPF text), alternatives by kernel version, and the
feature that needs it. A feature whose field a kernel lacks is switched off before the compile,
and the reason is kept to be shown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rsplice.errors import RspliceError
from rsplice.tracers.btf import Btf, Member

#: Features, and what is not seen without them. "core" cannot be done without.
FEATURES = {
    "core": "nothing can be traced",
    "identity": "pages are not compared: dispositions of splice and tee are inferred",
    "folio": "large folios count as one page in page_cache numbers",
    "mapcount": "page-table references of queued large folios are not counted",
    "extents": "copy_file_range is not told apart from a reflink by its pages",
    "network": "pages sent by sendfile and splice to sockets are not compared",
    "zerocopy": "MSG_ZEROCOPY is taken for a copying send",
    "fuse": "pages moved by FUSE replies are not compared",
    "fuse_ring": "messages of FUSE over io_uring are not seen",
    "registered": "memory of the kernel in a ring's table of buffers is taken for the caller's own",
    "disk": "disks of ublk are taken for those of a device",
    "io_uring": "io_uring operations are not seen, and counted as lost",
    "findings": "lifecycle findings are not looked for",
    "mappers": "findings do not name the process that still maps a page",
    "owner": "rsplice serve-probes cannot tell whose a process is",
}


@dataclass(frozen=True)
class Field:
    """One kernel field.

    :param name: its constant in the BPF text; NAME_SIZE is defined where *sized*
    :param paths: alternatives ``struct.member``, newest kernel first
    :param feature: a key of FEATURES
    """

    name: str
    paths: tuple[str, ...]
    feature: str = "core"
    sized: bool = False


def _fields(feature: str, text: str) -> list[Field]:
    """Parses lines "NAME struct.member [| alternative...]"; a "+" behind NAME asks for its size."""
    made = []
    for line in text.strip().splitlines():
        name, _, paths = line.strip().partition(" ")
        alternatives = tuple(p.strip() for p in paths.split("|"))
        made.append(Field(name.rstrip("+"), alternatives, feature, name.endswith("+")))
    return made


FIELDS: list[Field] = [
    *_fields(
        "core",
        """
        REGS_NR pt_regs.orig_ax
        REGS_ARG0 pt_regs.di
        REGS_ARG1 pt_regs.si
        REGS_ARG2 pt_regs.dx
        REGS_ARG3 pt_regs.r10
        REGS_ARG5 pt_regs.r9
        REGS_CX pt_regs.cx
        REGS_BX pt_regs.bx
        REGS_AX pt_regs.ax
        TASK_STATUS task_struct.thread_info.status
        TASK_FLAGS task_struct.flags
        TASK_FILES task_struct.files
        TASK_PID task_struct.pid
        TASK_TGID task_struct.tgid
        TASK_COMM task_struct.comm
        TASK_SIGNAL task_struct.signal
        TASK_LEADER task_struct.group_leader
        SIGNAL_LIVE signal_struct.live
        FILES_FDT files_struct.fdt
        FDT_FD fdtable.fd
        FDT_MAX fdtable.max_fds
        FILE_INODE file.f_inode
        FILE_MODE file.f_mode
        FILE_FLAGS file.f_flags
        FILE_MAPPING file.f_mapping
        FILE_POS file.f_pos
        FILE_PRIVATE file.private_data
        INODE_MODE inode.i_mode
        INODE_SB inode.i_sb
        INODE_RDEV inode.i_rdev
        INODE_FLAGS inode.i_flags
        INODE_SIZE inode.i_size
        SB_TYPE super_block.s_type
        SB_FLAGS super_block.s_flags
        SB_MAGIC super_block.s_magic
        FSTYPE_NAME file_system_type.name
        FSTYPE_FLAGS file_system_type.fs_flags
        SOCKET_SK socket.sk
        SOCK_FAMILY sock.__sk_common.skc_family
        SOCK_TYPE sock.sk_type
        SOCK_PROTOCOL sock.sk_protocol
        """,
    ),
    *_fields(
        "identity",
        """
        TASK_SPLICE_PIPE task_struct.splice_pipe
        PIPE_HEAD+ pipe_inode_info.head
        PIPE_TAIL pipe_inode_info.tail
        PIPE_RING_SIZE pipe_inode_info.ring_size
        PIPE_BUFS pipe_inode_info.bufs
        BUF_PAGE pipe_buffer.page
        BUF_OFFSET pipe_buffer.offset
        BUF_LEN pipe_buffer.len
        PAGE_FLAGS page.flags
        PAGE_HEAD page.compound_head | page.compound_info
        PAGE_MAPPING folio.mapping | page.mapping
        PAGE_MAPCOUNT page._mapcount
        PAGE_REFCOUNT page._refcount
        """,
    ),
    *_fields("folio", "FOLIO_PAGES folio._nr_pages | folio._folio_nr_pages"),
    *_fields("mapcount", "FOLIO_MAPCOUNT folio._large_mapcount"),
    *_fields(
        "extents",
        """
        MAPPING_XA_HEAD address_space.i_pages.xa_head
        XA_SHIFT xa_node.shift
        XA_SLOTS xa_node.slots
        """,
    ),
    *_fields(
        "network",
        """
        SOCK_HASH sock.__sk_common.skc_hash
        SKB_SK sk_buff.sk
        SKB_LEN sk_buff.len
        SKB_DATA_LEN sk_buff.data_len
        SKB_HEAD sk_buff.head
        SKB_DATA sk_buff.data
        SKB_END sk_buff.end
        SKB_TRANSPORT sk_buff.transport_header
        SHINFO_NR_FRAGS skb_shared_info.nr_frags
        SHINFO_FRAGS skb_shared_info.frags
        FRAG_PAGE skb_frag.netmem | bio_vec.bv_page
        FRAG_LEN skb_frag.len | bio_vec.bv_len
        """,
    ),
    *_fields(
        "zerocopy",
        """
        SOCK_FLAGS sock.__sk_common.skc_flags
        SOCK_DST sock.sk_dst_cache
        SOCK_ROUTE_CAPS sock.sk_route_caps
        SOCK_ZCKEY sock.sk_zckey
        DST_DEV dst_entry.dev
        NETDEV_FLAGS net_device.flags
        """,
    ),
    *_fields(
        "fuse",
        """
        FUSE_REQ_ARGS fuse_req.args
        FUSE_REQ_OPCODE fuse_req.in.h.opcode
        FUSE_ARGS_PAGES fuse_args_pages.folios | fuse_args_pages.pages
        FUSE_FILE_FLAGS fuse_file.open_flags
        FUSE_ARGS_NR fuse_args_pages.num_folios | fuse_args_pages.num_pages
        FUSE_ARGS_DESCS fuse_args_pages.descs
        FUSE_DESC_LENGTH fuse_folio_desc.length | fuse_page_desc.length
        FUSE_DESC_OFFSET fuse_folio_desc.offset | fuse_page_desc.offset
        FUSE_REPLY_LENGTH fuse_req.out.h.len
        FUSE_REPLY_ERROR fuse_req.out.h.error
        """,
    ),
    *_fields(
        "fuse_ring",
        """
        FUSE_REQ_QUEUE fuse_req.ring_queue
        FUSE_COPY_REQ fuse_copy_state.req
        FUSE_ARGS_NR_IN fuse_args.in_numargs
        FUSE_ARGS_NR_OUT fuse_args.out_numargs
        FUSE_ARGS_IN fuse_args.in_args
        FUSE_ARGS_OUT fuse_args.out_args
        FUSE_ARG_SIZE fuse_arg.size
        FUSE_PDU_ENTRY fuse_uring_pdu.ent
        FUSE_ENTRY_REQ fuse_ring_ent.fuse_req
        COMMAND_PDU io_uring_cmd.pdu
        COMMAND_OP io_uring_cmd.cmd_op
        """,
    ),
    *_fields(
        "disk",
        """
        MAPPING_HOST address_space.host
        BDEV_INODE bdev_inode.vfs_inode
        BDEV_DISK bdev_inode.bdev.bd_disk
        DISK_NAME gendisk.disk_name
        """,
    ),
    *_fields(
        "registered",
        """
        KIOCB_BUF_NODE io_kiocb.buf_node
        KIOCB_BUF_INDEX io_kiocb.buf_index
        RING_BUFFERS io_ring_ctx.buf_table
        TABLE_NR io_rsrc_data.nr
        TABLE_NODES io_rsrc_data.nodes
        RSRC_NODE_BUF io_rsrc_node.buf
        BUFFER_RELEASE io_mapped_ubuf.release
        BUFFER_IS_KERNELS io_mapped_ubuf.flags | io_mapped_ubuf.is_kbuf
        """,
    ),
    *_fields(
        "io_uring",
        """
        KIOCB_FILE io_kiocb.file
        KIOCB_OPCODE io_kiocb.opcode
        KIOCB_FLAGS io_kiocb.flags
        KIOCB_TASK io_kiocb.tctx | io_kiocb.task
        KIOCB_CTX io_kiocb.ctx
        KIOCB_USER_DATA io_kiocb.cqe.user_data
        KIOCB_FD io_kiocb.cqe.fd
        IO_SPLICE_FD_IN io_splice.splice_fd_in
        IO_SPLICE_LEN io_splice.len
        IO_SPLICE_FLAGS io_splice.flags
        IO_SPLICE_OFF_IN io_splice.off_in
        """,
    ),
    *_fields(
        "findings",
        """
        REGS_ARG4 pt_regs.r8
        BUF_OPS pipe_buffer.ops
        BUF_FLAGS pipe_buffer.flags
        PIPE_READERS pipe_inode_info.readers
        PIPE_FILES pipe_inode_info.files
        FILE_REF file.f_ref | file.f_count
        PAGE_INDEX folio.index | page.index
        MAPPING_HOST address_space.host
        INODE_MAPPING inode.i_mapping
        INODE_PIPE inode.i_pipe
        VMF_VMA vm_fault.vma
        VMA_FLAGS vm_area_struct.vm_flags
        INODE_GENERATION inode.i_generation
        INODE_INO inode.i_ino
        INODE_DENTRY inode.i_dentry.first
        SB_DEV super_block.s_dev
        DENTRY_ALIAS dentry.d_u.d_alias | dentry.d_alias
        DENTRY_NAME dentry.d_name.name
        """,
    ),
    *_fields(
        "mappers",
        """
        VMA_MM vm_area_struct.vm_mm
        VMA_FILE_NODE vm_area_struct.shared.rb
        MAPPING_VMAS address_space.i_mmap.rb_root.rb_node
        ANON_VMAS anon_vma.rb_root.rb_root.rb_node
        ANON_LINK_NODE anon_vma_chain.rb
        ANON_LINK_VMA anon_vma_chain.vma
        NODE_LEFT rb_node.rb_left
        NODE_RIGHT rb_node.rb_right
        MM_OWNER mm_struct.owner
        """,
    ),
    *_fields(
        "owner",
        """
        TASK_CRED task_struct.cred
        CRED_UID cred.uid
        CRED_EUID cred.euid
        CRED_SUID cred.suid
        CRED_GID cred.gid
        CRED_EGID cred.egid
        CRED_SGID cred.sgid
        CRED_PERMITTED cred.cap_permitted
        """,
    ),
]

# Sizes of structs that are walked as arrays or stepped over.
_SIZES = (("BUF_SIZE", ("pipe_buffer",), "identity"), ("PAGE_SIZE_OF", ("page",), "identity"),
          ("FRAG_SIZE", ("skb_frag", "bio_vec"), "network"),
          ("FUSE_ARG_STRIDE", ("fuse_arg",), "fuse_ring"))  # fmt: skip


@dataclass
class Layout:
    """The constants of one kernel.

    :ivar constants: name -> value, to be put in front of the BPF text
    :ivar missing: feature -> what the kernel lacks for it, in words
    """

    constants: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def has(self, feature: str) -> bool:
        return feature not in self.missing

    def defines(self) -> str:
        """The constants as C text."""
        lines = [f"#define {name} {value}" for name, value in self.constants.items()]
        lines += [f"#define HAVE_{name.upper()} {int(self.has(name))}" for name in FEATURES]
        return "\n".join(lines) + "\n"


def resolve(btf: Btf) -> Layout:
    """The layout that *btf* describes. RspliceError if a core field is missing."""
    layout = Layout()
    for wanted in FIELDS:
        found = _first(btf, wanted.paths)
        if found is None:
            layout.missing.setdefault(wanted.feature, f"this kernel has no {wanted.paths[0]}")
            continue
        layout.constants[wanted.name] = found.offset
        if wanted.sized:
            layout.constants[f"{wanted.name}_SIZE"] = found.size
    for name, structs, feature in _SIZES:
        size = next((s for s in map(btf.sizeof, structs) if s is not None), None)
        if size is None:
            layout.missing.setdefault(feature, f"this kernel has no struct {structs[0]}")
        else:
            layout.constants[name] = size
    _resolve_variants(btf, layout)
    if not layout.has("fuse") or not layout.has("io_uring"):
        layout.missing.setdefault("fuse_ring", "messages of FUSE or of io_uring are not seen")
    if "core" in layout.missing:
        raise RspliceError(f"cannot trace this kernel: {layout.missing['core']}")
    if not layout.has("identity"):
        for dependent in ("extents", "network", "fuse", "findings"):
            layout.missing.setdefault(dependent, layout.missing["identity"])
    return layout


def _first(btf: Btf, paths: tuple[str, ...]) -> Member | None:
    return next((m for m in map(btf.member, paths) if m is not None), None)


def _resolve_variants(btf: Btf, layout: Layout) -> None:
    """What differs between kernels by more than an offset."""
    constants = layout.constants
    bit = btf.enumerator("sock_flags", "SOCK_ZEROCOPY")
    if bit is None:
        layout.missing.setdefault("zerocopy", "this kernel has no SOCK_ZEROCOPY")
    constants["SOCK_ZEROCOPY_BIT"] = bit or 0
    # io_kiocb.tctx replaced io_kiocb.task in 6.13; the task is one step further.
    tctx = btf.member("io_kiocb.tctx")
    task = btf.member("io_uring_task.task")
    constants["KIOCB_TASK_IS_TCTX"] = int(tctx is not None)
    constants["TCTX_TASK"] = task.offset if task else 0
    args = btf.tracepoint_args("io_uring_complete") or []
    constants["URING_COMPLETE_HAS_CQE"] = int("struct io_uring_cqe *" in args)
    # Zero-copy sends came with 6.0; before that nothing has these flags.
    send = btf.member("io_sr_msg.flags")
    constants["IO_SEND_FLAGS"] = send.offset if send else 0
    # msg_ubuf came with 6.0.
    for name in ("flags", "ubuf"):
        member = btf.member(f"msghdr.msg_{name}")
        constants[f"MSGHDR_{name.upper()}"] = member.offset if member else 0
    # Iterators of pipe buffers went with 6.5; before 5.14 the type shares a word with flags.
    constants["ITER_PIPE"] = btf.enumerator("iter_type", "ITER_PIPE") or 0
    kind = btf.member("iov_iter.iter_type") or btf.member("iov_iter.type")
    constants["ITER_TYPE"] = kind.offset if kind else 0
    constants["ITER_TYPE_SIZE"] = kind.size if kind else 0
    bit = btf.enumerator("pageflags", "PG_head")
    if bit is None:
        layout.missing.setdefault("folio", "this kernel has no PG_head")
    constants["PG_HEAD_BIT"] = bit or 0
    for name in ("writeback", "dirty", "lru", "private", "swapbacked"):
        bit = btf.enumerator("pageflags", f"PG_{name}")
        if bit is None:
            layout.missing.setdefault("findings", f"this kernel has no PG_{name}")
        constants[f"PG_{name.upper()}_BIT"] = bit or 0
    # file_ref_t (6.13) starts at 0, the counter before it at 1.
    constants["FILE_REF_ONE"] = int(btf.member("file.f_ref") is None)
    # Before 5.14 a byte called tx_flags says it, with another bit.
    flags = btf.member("skb_shared_info.flags")
    constants["SHINFO_FLAGS"] = flags.offset if flags else 0
    # Before 5.12 sendfile to a pipe goes through the task's own pipe, as to any other file.
    constants["SENDFILE_INTO_PIPE"] = int(btf.function_id("splice_file_to_pipe") is not None)
    # Since 7.3 the pages of a READ or WRITE over a ring need not go by the server's buffer.
    queue, bit = btf.member("fuse_ring_queue.zero_copy"), btf.bit("fuse_args.zero_copy")
    constants["FUSE_ZERO_COPY"] = int(queue is not None and bit is not None)
    constants["FUSE_QUEUE_ZERO_COPY"] = queue.offset if queue else 0
    constants["FUSE_ARGS_ZERO_COPY"] = bit or 0
    backing = btf.member("fuse_file.passthrough")  # 6.9
    constants["FUSE_PASSTHROUGH"] = int(backing is not None)
    constants["FUSE_FILE_BACKING"] = backing.offset if backing else 0
    pt_regs = btf.struct_id("pt_regs")
    constants["BTF_PT_REGS"] = pt_regs or 0
