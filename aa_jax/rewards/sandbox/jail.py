"""Locks its own process in, then becomes the untrusted program.

A program of its own, started as ``python -I -S jail.py <spec.json> <status fd>`` by
`aa_jax.rewards.sandbox.runner`; imports the standard library only. There is no second process: what
is set up here (namespaces, a root of its own, limits, the system call filter) survives ``execve``.

If something cannot be set up, a JSON line on the status descriptor says what, and the program is
never started. The descriptor closes itself on ``execve``: nothing read from it means success.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys

# asm/unistd: x86_64, aarch64. Those a program must never make, whatever it judges.
CALLS = {
    # network, and ways around a filter on calls
    "socket": (41, 198), "io_uring_setup": (425, 425), "bpf": (321, 280),
    # other processes: creating, signalling, looking into, moving out of the group
    "fork": (57, None), "vfork": (58, None), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "setsid": (112, 157), "setpgid": (109, 154),
    "setpriority": (141, 140), "perf_event_open": (298, 241),
    # limits and privileges
    "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "userfaultfd": (323, 282),
    # mounts and the machine
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "mount_setattr": (442, 442),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    # owners, modes and times of files: Landlock does not know these
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # memory that belongs to no process and no file system
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "memfd_create": (319, 279),
}  # fmt: skip
CLONE, CLONE3 = (56, 220), (435, 435)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

NEWNS, NEWUTS, NEWIPC = 0x20000, 0x4000000, 0x8000000
NEWUSER, NEWNET = 0x10000000, 0x40000000
CLONE_THREAD = 0x10000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT = 1, 2, 4, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_SETATTR, AT_RECURSIVE = 442, 0x8000
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
ROOT, BOX = "/root", "/box"  # beneath the scratch folder, and as the program sees it
FIRST_UID = 0x40000000  # owners that nobody else has

libc = ctypes.CDLL(None, use_errno=True)


class SetupError(Exception):
    """The sandbox cannot be built here."""


def check(result, what):
    """Turns -1 into an error that says what failed."""
    if result == -1:
        raise SetupError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(source, target, kind, flags, options=""):
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    check(libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() or None), f"mount {target}")


def architecture():
    """(column of the call numbers, audit number of the architecture)."""
    try:
        return ARCHITECTURES[os.uname().machine]
    except KeyError:
        raise SetupError(f"no system call numbers for {os.uname().machine}") from None


# Namespaces ---------------------------------------------------------------------------------------


def enter_namespaces(spec):
    """A file system, network and host name of its own; returns the uid to become, or None."""
    own = NEWNS | NEWUTS | NEWIPC | NEWNET
    uid, gid = os.geteuid(), os.getegid()
    with open("/proc/self/uid_map") as file:
        all_mapped = any(int(line.split()[2]) > FIRST_UID for line in file)
    if uid == 0 and all_mapped and libc.unshare(own) == 0:
        return FIRST_UID + os.getpid()
    check(libc.unshare(own | NEWUSER), "user namespaces (unshare)")
    inside = uid or 65534  # not root inside either, so that execve leaves no capability
    for name, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"),
                       ("gid_map", f"{gid or 65534} {gid} 1")):  # fmt: skip
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return None


def build_root(spec, uid):
    """Replaces the file system by read-only system folders and one scratch folder in memory."""
    root, megabytes = spec["scratch"] + ROOT, spec["disk_mb"]
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("none", root, "tmpfs", MS_NOSUID, "size=4m,mode=755")
    for path in spec["readable"]:
        target = root + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(path):
            os.symlink(os.readlink(path), target)
        elif os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
            bind(path, target, MS_RDONLY | MS_NOSUID | MS_NODEV)
        elif os.path.exists(path):
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
            bind(path, target, MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.makedirs(root + "/dev")
    for name in ("null", "zero", "urandom", "random"):
        os.close(os.open(f"{root}/dev/{name}", os.O_CREAT | os.O_WRONLY))
        bind(f"/dev/{name}", f"{root}/dev/{name}", MS_NOSUID)
    os.mkdir(root + BOX)
    mount("none", root + BOX, "tmpfs", MS_NOSUID | MS_NODEV,
          f"size={megabytes}m,nr_inodes=4096,mode=700")  # fmt: skip
    write_files(spec["files"], root + BOX)
    if uid is not None:
        os.chown(root + BOX, uid, uid)
    os.mkdir(root + "/old")
    pivot_root = CALLS["pivot_root"][architecture()[0]]
    check(libc.syscall(pivot_root, root.encode(), (root + "/old").encode()), "pivot_root")
    os.chdir("/")
    check(libc.umount2(b"/old", MNT_DETACH), "umount /old")
    os.rmdir("/old")
    mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)
    os.chdir(BOX)


def bind(source, target, flags):
    mount(source, target, None, MS_BIND | MS_REC)
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)
    check(
        libc.syscall(MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, 32),
        f"mount_setattr {target} (Linux 5.12)",
    )


def write_files(files, folder):
    for name, text in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(text)


# Landlock -----------------------------------------------------------------------------------------


def enter_landlock(spec):
    """The ordinary file system, of which only system folders can be read, one folder written."""
    box = spec["scratch"] + ROOT + BOX
    os.makedirs(box)
    write_files(spec["files"], box)
    os.chdir(box)
    no_new_privileges()
    version = libc.syscall(LANDLOCK_CREATE, None, 0, 1)
    if version < 3:  # without truncation rights any file of the user could be emptied
        raise SetupError("Landlock (Linux 6.2) is not there")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    ruleset = struct.pack("QQ", everything, 3) if version >= 4 else struct.pack("Q", everything)
    handle = check(libc.syscall(LANDLOCK_CREATE, ruleset, len(ruleset), 0), "landlock ruleset")
    read = 0b1101  # execute, read files, list folders
    for path in spec["readable"]:
        if os.path.isdir(path):
            allow(handle, path, read)
        elif os.path.exists(path):
            allow(handle, path, 0b101)
    for name in ("null", "zero", "urandom", "random"):
        allow(handle, f"/dev/{name}", 0b110)
    allow(handle, box, everything & ~(1 << 6 | 1 << 9 | 1 << 11 | 1 << 15))  # no devices, sockets
    check(libc.syscall(LANDLOCK_RESTRICT, handle, 0), "landlock")
    os.close(handle)


def allow(handle, path, rights):
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("<Qi", rights, folder)
    check(libc.syscall(LANDLOCK_ADD, handle, 1, rule, 0), f"landlock rule for {path}")
    os.close(folder)


# Limits -------------------------------------------------------------------------------------------


def set_limits(spec, own_uid):
    """CPU seconds, bytes of memory, bytes per file, open files, threads; no core dumps."""
    cpu = spec["cpu_seconds"]
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_AS": (spec["memory_mb"] << 20,) * 2,
        "RLIMIT_FSIZE": (spec["disk_mb"] << 20,) * 2,
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
    }
    if own_uid:  # counted per user: meaningless where the user's other programs count too
        limits["RLIMIT_NPROC"] = (64, 64)
    for name, value in limits.items():
        if (kind := getattr(resource, name, None)) is not None:
            hard = resource.getrlimit(kind)[1]
            if hard != resource.RLIM_INFINITY:
                value = tuple(min(hard, bound) for bound in value)
            try:
                resource.setrlimit(kind, value)
            except ValueError:
                if sys.platform == "linux":  # elsewhere address space may have no limit
                    raise


def no_new_privileges():
    """execve can only lose rights from here on; root keeps its files, not its powers."""
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    for capability in range(64):  # fails without any, and beyond the last one
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def filter_calls():
    """seccomp: the calls of `CALLS` fail with EPERM, and so does clone unless it makes a thread."""
    column, audit = architecture()
    numbers = sorted(row[column] for row in CALLS.values() if row[column] is not None)
    load, equal, at_least, bits, back = 0x20, 0x15, 0x35, 0x45, 0x06
    # Where to go is written as a name and resolved below: offsets count from the next instruction.
    lines = [
        (load, None, None, 4), (equal, None, "kill", audit),
        (load, None, None, 0), (at_least, "kill", None, 0x40000000),
        (equal, "missing", None, CLONE3[column]), (equal, "clone", None, CLONE[column]),
        *((equal, "deny", None, number) for number in numbers),
        (back, None, None, 0x7FFF0000),
    ]  # fmt: skip
    places = {}
    for name, tail in {
        "clone": [(load, None, None, 16), (bits, "allow", "deny", CLONE_THREAD)],
        "allow": [(back, None, None, 0x7FFF0000)],
        "deny": [(back, None, None, 0x00050000 | 1)],  # EPERM
        "missing": [(back, None, None, 0x00050000 | 38)],  # ENOSYS: the C library uses clone
        "kill": [(back, None, None, 0x80000000)],
    }.items():
        places[name] = len(lines)
        lines += tail
    code = b"".join(
        struct.pack("HBBI", op, *(places[to] - i - 1 if to else 0 for to in (yes, no)), k)
        for i, (op, yes, no, k) in enumerate(lines)
    )
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer))
    check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        spec = json.load(file)
    status = int(sys.argv[2])
    os.set_inheritable(status, False)
    try:
        os.umask(0o022)
        level, uid = spec["isolation"], None
        if level == "namespaces":
            uid = enter_namespaces(spec)
            build_root(spec, uid)
        elif level == "landlock":
            enter_landlock(spec)
        else:
            os.makedirs(spec["scratch"] + ROOT + BOX)
            write_files(spec["files"], spec["scratch"] + ROOT + BOX)
            os.chdir(spec["scratch"] + ROOT + BOX)
        set_limits(spec, level == "namespaces")
        if sys.platform == "linux":
            no_new_privileges()
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        if sys.platform == "linux":
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != spec["parent"]:  # it ended before the line above
                raise SetupError("the process that asked has ended")
            if level != "limits" or os.uname().machine in ARCHITECTURES:
                filter_calls()
        os.execve(spec["argv"][0], spec["argv"], spec["environment"])
    except Exception as error:
        os.write(status, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        os._exit(125)


if __name__ == "__main__":
    main()
