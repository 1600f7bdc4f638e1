"""The system calls refused to a sandboxed program: a seccomp filter in classic BPF, made as bytes.

It refuses calls that escape the limits or namespaces: uncounted memory (System V segments and
queues, memfd), namespaces, mounts, sockets other than Unix, IPv4 and IPv6, io_uring (which makes
sockets too), kernel keys, ptrace, bpf. Left out: processors other than x86_64 and aarch64.
"""

import errno
import platform
import struct

# name: (x86_64, aarch64)
REFUSED = {
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "io_uring_setup": (425, 425),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
}
CLONE, CLONE3 = (56, 220), 435
SOCKETS = ((41, 198), (53, 199))  # socket, socketpair
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
NAMESPACE_FLAGS = 0x7E020080
FAMILIES = (1, 2, 10)  # AF_UNIX, AF_INET, AF_INET6
X32 = 0x40000000  # numbers of x86_64's second table begin here

LOAD, JUMP_IF_EQUAL, JUMP_IF_GREATER_EQUAL, JUMP_IF_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
# offsets in struct seccomp_data; the low half of an argument comes first
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000


def seccomp_filter(machine: str = platform.machine()) -> bytes | None:
    """The filter as an array of struct sock_filter, None for other processors."""
    if machine not in AUDIT_ARCH:
        return None
    column = list(AUDIT_ARCH).index(machine)
    refuse = _refuse(errno.EPERM)
    program = [_load(ARCH), _unless(JUMP_IF_EQUAL, AUDIT_ARCH[machine], KILL), _load(NUMBER)]
    if machine == "x86_64":
        program.append(_when(JUMP_IF_GREATER_EQUAL, X32, refuse))
    program += [_when(JUMP_IF_EQUAL, numbers[column], refuse) for numbers in REFUSED.values()]
    # its flags are in memory; libc falls back to clone
    program.append(_when(JUMP_IF_EQUAL, CLONE3, _refuse(errno.ENOSYS)))
    test = [_load(FIRST_ARGUMENT), _when(JUMP_IF_ANY_BIT, NAMESPACE_FLAGS, refuse), _return(ALLOW)]
    program.append(_when_code(CLONE[column], b"".join(test)))
    allowed = b"".join(_when(JUMP_IF_EQUAL, family, ALLOW) for family in FAMILIES)
    for numbers in SOCKETS:
        program.append(
            _when_code(numbers[column], _load(FIRST_ARGUMENT) + allowed + _return(_refuse(errno.EAFNOSUPPORT)))
        )
    return b"".join([*program, _return(ALLOW)])


def _instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, constant)


def _load(offset: int) -> bytes:
    return _instruction(LOAD, offset)


def _return(value: int) -> bytes:
    return _instruction(RETURN, value)


def _when(jump: int, constant: int, result: int) -> bytes:
    """Returns `result` where the comparison holds."""
    return _instruction(jump, constant, 0, 1) + _return(result)


def _unless(jump: int, constant: int, result: int) -> bytes:
    return _instruction(jump, constant, 1, 0) + _return(result)


def _when_code(number: int, code: bytes) -> bytes:
    """Runs `code`, which must return, where the loaded system call number is `number`."""
    return _instruction(JUMP_IF_EQUAL, number, 0, len(code) // 8) + code


def _refuse(error: int) -> int:
    return REFUSE | error
