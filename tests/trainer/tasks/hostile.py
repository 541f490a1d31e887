"""Programs that try to forge a verdict, or to reach this machine from their sandbox; what their tests must say.

HOME, SECRET, MARKER, PORT, ABSTRACT and TRAINER are defined before each: a folder with a secret file, that file, a file to be
written, a port and an abstract socket that listen, and the pid of the trainer.
"""

from typing import NamedTuple


class Hostile(NamedTuple):
    program: str
    tests: tuple[str, ...]
    verdicts: list[bool]  # one a test
    endless: bool = False  # takes all the time that it is given


HOSTILE = {
    "exits with 0": Hostile(
        """
import os
os._exit(0)
""",
        ("assert f() == 1",),
        [False],
    ),
    "raises SystemExit when called": Hostile(
        """
def f():
    raise SystemExit(0)
""",
        (
            "assert f() == 1",
            "assert f() == 2",
        ),
        [False, False],
    ),
    "exits in an exit handler": Hostile(
        """
import atexit, os
atexit.register(os._exit, 0)
def f():
    return 2
""",
        (
            "assert f() == 1",
            "assert f() == 2",
        ),
        [False, True],
    ),
    "prints a verdict": Hostile(
        r"""
print('true\n' * 100, flush=True)
def f():
    print('true')
    return 2
""",
        (
            "assert f() == 1",
            "assert f() == 2",
        ),
        [False, True],
    ),
    "writes a verdict to every descriptor": Hostile(
        r"""
import os
for d in range(32):
    try:
        os.write(d, b'true\n' * 9)
    except OSError:
        pass
def f():
    return 1
""",
        (
            "assert f() == 1",
            "assert f() == 1",
        ),
        [False, False],
    ),
    "answers calls by itself": Hostile(
        r"""
import os
for d in range(3, 32):
    try:
        os.write(d, b'{"value": {"tuple": [1, {"tuple": []}]}}\n' * 3)
    except OSError:
        pass
def f():
    return 2
""",
        (
            "assert f() == 2",
            "assert f() == 2",
        ),
        [False, False],
    ),
    "returns what equals everything": Hostile(
        """
class Any:
    def __eq__(self, other):
        return True
class Int(int):
    def __eq__(self, other):
        return True
    __hash__ = int.__hash__
def f():
    return Any()
def g():
    return Int(7)
""",
        (
            "assert f() == 1",
            "assert g() == 1",
            "assert g() == 7",
        ),
        [False, False, True],
    ),
    "patches what tests use": Hostile(
        """
import builtins, math
builtins.AssertionError = builtins.abs = lambda *a: 0
math.isclose = lambda *a, **k: True
def f():
    return 5
""",
        (
            "import math\nassert math.isclose(f(), 1)",
            "assert abs(f() - 1) < 1",
            "assert f() == 5",
        ),
        [False, False, True],
    ),
    "defines the names of builtins": Hostile(
        """
def abs(x):
    return 0
def len(x):
    return 3
def f():
    return [1]
""",
        (
            "assert abs(f()[0]) == 0",
            "assert len(f()) == 3",
            "assert f() == [1]",
        ),
        [False, False, True],
    ),
    "patches the cell": Hostile(
        """
import sys
frame = sys._getframe()
while frame:
    for name in list(frame.f_globals):
        if name in ('encode', 'decode', 'json'):
            frame.f_globals[name] = lambda *a: True
    frame = frame.f_back
def f():
    return 1
""",
        ("assert f() == 2",),
        [False],
    ),
    "looks for its tests": Hostile(
        """
import gc, sys
def f():
    texts = [o for o in gc.get_objects() if isinstance(o, str)] + [str(vars(sys))] + sys.argv
    return 'hidden-' + 'in-test' if any('hidden-' + 'in-test' in t for t in texts) else 'nothing'
""",
        (
            "assert f() == 'hidden-in-test'",
            "assert f() == 'nothing'",
        ),
        [False, True],
    ),
    "recurses without end": Hostile(
        """
def f():
    return f()
""",
        (
            "assert f()",
            "try:\n    f()\nexcept RecursionError:\n    pass",
        ),
        [False, True],
    ),
    "answers too much": Hostile(
        """
def f(n):
    return 'x' * n
""",
        (
            "assert len(f(2**21)) == 2**21",
            "assert f(1) == 'x'",
        ),
        [False, False],
    ),
    "nests its answer": Hostile(
        """
def f():
    x = []
    for _ in range(900):
        x = [x]
    return x
def g():
    x = []
    for _ in range(10**5):
        x = [x]
    return x
def h():
    return 1
""",
        (
            "assert g()",
            "assert h() == 1",
        ),
        [False, True],
    ),
    "floods its output": Hostile(
        """
import os
def f():
    for _ in range(300):
        os.write(1, b'x' * 2**20)
        os.write(2, b'x' * 2**20)
    return 1
""",
        ("assert f() == 1",),
        [True],
    ),
    "floods the answers": Hostile(
        """
import os
while True:
    for d in range(3, 8):
        try:
            os.write(d, b'x' * 2**16)
        except OSError:
            pass
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "sleeps": Hostile(
        """
import time
time.sleep(1000)
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "ignores signals and spins": Hostile(
        """
import signal
for s in range(1, 64):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "hangs in C": Hostile(
        """
def f():
    return 9 ** 9 ** 9 % 7
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "bombs memory": Hostile(
        """
def f():
    try:
        return len(bytearray(2**30))
    except MemoryError:
        return 'refused'
""",
        ("assert f() == 'refused'",),
        [True],
    ),
    "bombs memory by lists": Hostile(
        """
def f():
    x = [0]
    try:
        while True:
            x += x
    except MemoryError:
        return 'refused'
""",
        ("assert f() == 'refused'",),
        [True],
    ),
    "fills the disk": Hostile(
        """
def f():
    n = 0
    try:
        for i in range(100):
            with open(f'/tmp/{i}', 'wb') as file:
                for _ in range(4):
                    n += file.write(b'x' * 2**20)
                    file.flush()
    except OSError:
        pass
    return n
""",
        ("assert 0 < f() <= 16 * 2**20",),
        [True],
    ),
    "writes one large file": Hostile(
        """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def f():
    try:
        with open('/tmp/large', 'wb') as file:
            for _ in range(8):
                file.write(b'x' * 2**20)
    except OSError:
        pass
    import os
    return os.path.getsize('/tmp/large')
""",
        ("assert f() <= 4 * 2**20",),
        [True],
    ),
    "forks without end": Hostile(
        """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "counts what it can fork": Hostile(
        """
import os, time
def f():
    n = 0
    while True:
        try:
            if os.fork() == 0:
                time.sleep(100)
        except OSError:
            return n
        n += 1
""",
        ("assert f() <= 8",),
        [True],
    ),
    "leaves a daemon": Hostile(
        """
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            pass
    os._exit(0)
def f():
    return 1
""",
        ("assert f() == 1",),
        [True],
    ),
    "asks not to die with its parent": Hostile(
        """
import ctypes, time
ctypes.CDLL(None).prctl(1, 0)
time.sleep(1000)
""",
        ("assert f() == 1",),
        [False],
        endless=True,
    ),
    "opens many files": Hostile(
        """
def f():
    files = []
    try:
        for _ in range(1000):
            files.append(open('/dev/null'))
    except OSError:
        pass
    return len(files)
""",
        ("assert f() < 32",),
        [True],
    ),
    "raises its limits": Hostile(
        """
import resource
def f():
    raised = 0
    for which in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU):
        try:
            resource.setrlimit(which, (2**40, 2**40))
            raised += 1
        except (OSError, ValueError):
            pass
    return raised
""",
        ("assert f() == 0",),
        [True],
    ),
    "reads the environment": Hostile(
        """
import os
def f():
    texts = [str(dict(os.environ))]
    for pid in [p for p in os.listdir('/proc') if p.isdecimal()]:
        try:
            texts.append(open(f'/proc/{pid}/environ').read())
        except OSError:
            pass
    return ' '.join(texts)
""",
        (
            "assert 'PATH' in f()",
            "assert 'a-secret-token' in f()",
        ),
        [True, False],
    ),
    "reads the home directory": Hostile(
        """
import os
def f():
    found = []
    for folder, _, files in os.walk(HOME):
        found += files
    return 'a-secret-file' in found
""",
        ("assert f() is False",),
        [True],
    ),
    "reads a file by its path": Hostile(
        """
def f():
    try:
        return open(SECRET).read()
    except OSError:
        return 'refused'
""",
        ("assert f() == 'refused'",),
        [True],
    ),
    "reads the password file": Hostile(
        """
import os
def f():
    return [p for p in ('/etc/passwd', '/etc/shadow', '/root/.ssh', '/var/log', '/home', '/sys') if os.path.exists(p)]
""",
        ("assert f() == []",),
        [True],
    ),
    "writes outside": Hostile(
        """
def f():
    wrote = []
    places = [MARKER, '/marker', '/usr/marker', '/usr/lib/marker', '/dev/marker', '/dev/shm/marker']
    for place in (*places, '/proc/sys/kernel/hostname'):
        try:
            open(place, 'w').write('x')
            wrote.append(place)
        except OSError:
            pass
    return wrote
""",
        ("assert f() == []",),
        [True],
    ),
    "makes the system writable": Hostile(
        """
import ctypes
def f():
    c = ctypes.CDLL(None, use_errno=True)
    done = [c.mount(None, p, None, 32 | 4096, None) for p in (b'/', b'/usr')] + [c.umount2(b'/usr', 2), c.chroot(b'/tmp')]
    return [d == 0 for d in done]
""",
        ("assert f() == [False] * 4",),
        [True],
    ),
    "connects to this machine": Hostile(
        """
import socket
def f():
    try:
        socket.create_connection(('127.0.0.1', PORT), timeout=1)
        return 'connected'
    except OSError:
        return 'refused'
""",
        ("assert f() == 'refused'",),
        [True],
    ),
    "connects by an abstract socket": Hostile(
        r"""
import socket
def f():
    s = socket.socket(socket.AF_UNIX)
    try:
        s.connect('\0' + ABSTRACT)
        return 'connected'
    except OSError:
        return 'refused'
""",
        ("assert f() == 'refused'",),
        [True],
    ),
    "has no way out": Hostile(
        """
import socket
def f():
    return [name for _, name in socket.if_nameindex() if name != 'lo' and not name.endswith('0')]
""",
        ("assert f() == []",),
        [True],
    ),
    "kills what it sees": Hostile(
        """
import os
def f():
    killed = 0
    for pid in (TRAINER, os.getppid(), -1):
        if pid > 1:
            try:
                os.kill(pid, 9)
                killed += 1
            except OSError:
                pass
    return killed
""",
        ("assert f() == 0",),
        [True],
    ),
    "kills all of its own": Hostile(
        """
import os
os.kill(-1, 9)
def f():
    return 1
""",
        ("assert f() == 2",),
        [False],
    ),
    "traces others": Hostile(
        """
import ctypes, os
def f():
    c = ctypes.CDLL(None)
    return [pid for pid in (1, TRAINER, os.getppid()) if pid != os.getpid() and c.ptrace(16, pid, 0, 0) == 0]
""",
        ("assert f() == []",),
        [True],
    ),
    "gains rights by set-uid programs": Hostile(
        r"""
import os, subprocess
def f():
    out = []
    for command in (['su', '-c', 'id -u'], ['sudo', '-n', 'id', '-u'], ['mount', '--version']):
        try:
            out.append(subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=1).stdout.strip() == b'0')
        except (OSError, subprocess.SubprocessError):
            out.append(False)
    status = open('/proc/self/status').read()
    return any(out) or 'NoNewPrivs:\t1' not in status or 'CapBnd:\t0000000000000000' not in status
""",
        ("assert f() is False",),
        [True],
    ),
    "swaps a link while it is read": Hostile(
        """
import os
def f():
    os.symlink(SECRET, '/tmp/link')
    os.symlink('/proc/1/root' + SECRET, '/tmp/other')
    os.symlink('/old' + SECRET, '/tmp/third')
    found = []
    for place in ('/tmp/link', '/tmp/other', '/tmp/third'):
        try:
            found.append(open(place).read())
        except OSError:
            pass
    return found
""",
        ("assert f() == []",),
        [True],
    ),
    "leaves something for the next": Hostile(
        """
open('/tmp/left', 'w').write('x')
def f():
    import os
    return os.listdir('/tmp')
""",
        ("assert f() == ['left']",),
        [True],
    ),
    "finds what another left": Hostile(
        """
def f():
    import os
    return os.listdir('/tmp')
""",
        ("assert f() == []",),
        [True],
    ),
    "leaves a key for the next": Hostile(
        """
import ctypes, os
def f():
    add_key, keyctl = {'x86_64': (248, 250), 'aarch64': (217, 219)}[os.uname().machine]
    system = ctypes.CDLL(None)
    of_user, of_session, get = -4, -3, 0
    return [system.syscall(add_key, b'user', b'left', b'x', 1, ring) for ring in (of_user, of_session)] + [
        system.syscall(keyctl, get, of_session, 0)
    ]
""",
        ("assert f() == [-1] * 3",),
        [True],
    ),
    "takes memory that no limit counts": Hostile(
        """
import ctypes, os
def f():
    return [ctypes.CDLL(None).shmget(0, ctypes.c_size_t(2**20), 0o1700), ctypes.CDLL(None).msgget(0, 0o1700)]
def g():
    os.memfd_create('memory')
def h():
    open('/tmp/x', 'w').close()
    os.setxattr('/tmp/x', 'user.x', b'x' * 2**15)
""",
        (
            "assert f() == [-1, -1]",
            "try:\n    g()\nexcept PermissionError:\n    pass\nelse:\n    raise AssertionError",
            "try:\n    h()\nexcept PermissionError:\n    pass\nelse:\n    raise AssertionError",
        ),
        [True] * 3,
    ),
    "makes namespaces of its own": Hostile(
        """
import ctypes, os
def f():
    system = ctypes.CDLL(None)
    of_user, of_mounts, dies_with = 0x10000000, 0x20000, 17
    made = [system.unshare(of_user), system.unshare(of_user | of_mounts)]  # in which it could mount what it likes
    made.append(system.syscall({'x86_64': 56, 'aarch64': 220}[os.uname().machine], of_user | dies_with, 0, 0, 0, 0))
    if made[-1] == 0:
        os._exit(0)
    return made
""",
        ("assert f() == [-1] * 3",),
        [True],
    ),
    "asks the hypervisor and the kernel": Hostile(
        """
import ctypes, os, socket
def f():
    made = []
    for family in (40, 38, 17, 44):  # of virtual machines, ciphers, packets, fast packets
        try:
            socket.socket(family, socket.SOCK_STREAM)
            made.append(family)
        except OSError:
            pass
    return made
def g():
    calls = {'x86_64': (323, 321, 298, 310), 'aarch64': (282, 280, 241, 270)}[os.uname().machine]
    return [ctypes.CDLL(None).syscall(n, 0, ctypes.create_string_buffer(256), 120, 0, 0, 0) for n in (425, *calls)]
""",
        (
            "assert f() == []",
            "assert g() == [-1] * 5",
        ),
        [True, True],
    ),
}
