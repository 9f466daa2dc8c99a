#!/usr/bin/env bash
# slurm-lab.sh - the cluster of the tests: a real Slurm (munged + slurmctld + N slurmd) on one Linux host. tests/cluster/lab.py uses it.
#
#   slurm-lab.sh install            install what is missing with apt-get, or say in one line that it cannot; with it
#                                   what ALSO_INSTALL names, for other tests (commands whose packages have their names)
#   slurm-lab.sh up     [options]   install what is missing, start everything, wait until all nodes are idle
#   slurm-lab.sh down   [options]   cancel jobs, stop only what `up` started (pid files), remove namespaces
#   slurm-lab.sh status [options]   exit 0: everything runs and all nodes respond; 1: partly; 3: not running
#   slurm-lab.sh env    [options]   print `export SLURM_CONF=...` (use: eval "$(slurm-lab.sh env -d DIR)")
#   slurm-lab.sh exec   [options] -- CMD...   run CMD with SLURM_CONF set
#
# options (environment variable in brackets; `up` remembers them in DIR/params):
#   -d DIR    state directory                         [SLURM_LAB_DIR]    ./slurm-lab-state
#   -n N      number of nodes                         [SLURM_LAB_NODES]  2
#   -c N      CPUs advertised per node (may be a lie) [SLURM_LAB_CPUS]   nproc
#   -g N      fake GPUs per node (gres, CUDA_VISIBLE_DEVICES only) [SLURM_LAB_GPUS] 0
#   -p NAME   node name prefix                        [SLURM_LAB_PREFIX] node
#   -i MODE   isolation: auto|netns|hostnet|plain     [SLURM_LAB_ISOLATION] auto
#               netns   every node has its own network (own IP, own localhost), pid, host-name namespaces
#               hostnet own pid and host-name namespaces, host's network; nodes are 127.77.0.K
#               plain   no namespaces; node names are added to /etc/hosts and removed by `down`
#               auto    the first of these that this machine allows
# tunables: SLURM_LAB_CRED_EXPIRE (10: a requeued job starts again after this + ~1 s; Slurm's default is 120)
#           SLURM_LAB_KILLWAIT (10: seconds between SIGTERM and SIGKILL; Slurm's default is 30)
#           SLURM_LAB_NODE_TIMEOUT (60: SlurmdTimeout, a dead node is DOWN after this; Slurm's default is 300)
set -u -o pipefail
umask 022
export LC_ALL=C
PATH=${PATH:+$PATH:}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

log() { printf 'slurm-lab: %s\n' "$*" >&2; }
die() { log "ERROR: $*"; exit 1; }
usage() { sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"; }

cmd=${1:-}; [ $# -gt 0 ] && shift
o_n= o_c= o_g= o_p= o_i= DIR=${SLURM_LAB_DIR:-$PWD/slurm-lab-state}
while [ $# -gt 0 ]; do
  case $1 in
    -d|-n|-c|-g|-p|-i) [ $# -ge 2 ] || die "$1 needs a value" ;;
  esac
  case $1 in
    -d) DIR=$2; shift 2;;  -n) o_n=$2; shift 2;;  -c) o_c=$2; shift 2;;
    -g) o_g=$2; shift 2;;  -p) o_p=$2; shift 2;;  -i) o_i=$2; shift 2;;
    --) shift; break;;     -h|--help) usage; exit 0;;
    *) die "unknown option $1 (see --help)";;
  esac
done
DIR=$(realpath -m -- "$DIR") || die "bad directory"
case $DIR in *[!A-Za-z0-9/._+-]*) die "state directory may hold only A-Za-z0-9/._+- : $DIR";; esac
HASH=$(printf %s "$DIR" | sha1sum | cut -c1-12); TAG=${HASH:0:6}; HNUM=$((16#${HASH:0:8}))
CONF=$DIR/conf/slurm.conf

# ---------------------------------------------------------------- processes
starttime() { # start time of a live, non-zombie pid (pids get reused; zombies may linger when PID 1 reaps late)
  local s; s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  s=${s##*) }; set -- $s; [ "$1" != Z ] && [ "$1" != X ] || return 1; echo "${20}"
}
save_pid() { echo "$2 $(starttime "$2")" >"$DIR/pids/$1"; }
live_pid() { # prints the pid recorded under NAME if that very process still lives
  local p t; read -r p t 2>/dev/null <"$DIR/pids/$1" || return 1
  [ -n "${t:-}" ] && [ "$(starttime "$p")" = "$t" ] && echo "$p"
}
spawn() { # NAME LOGFILE CMD...   detached, own session, clean environment
  local name=$1 out=$2; shift 2
  env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root \
    setsid "$@" </dev/null >>"$out" 2>&1 9>&- &
  local p=$!; disown "$p" 2>/dev/null; sleep 0.05; save_pid "$name" "$p"
}
stop() { # NAME [SECONDS]   TERM, then KILL
  local p c i; p=$(live_pid "$1") || { rm -f "$DIR/pids/$1"; return 0; }
  # a namespaced node is unshare -> bash (its PID 1) -> slurmd: TERM goes to the inner bash
  c=; [[ $1 == node-* ]] && c=$(cat "/proc/$p/task/$p/children" 2>/dev/null)
  [ "$(cat "/proc/$p/comm" 2>/dev/null)" = unshare ] || c=
  kill -TERM ${c:-$p} 2>/dev/null
  for ((i = 0; i < ${2:-10} * 10; i++)); do live_pid "$1" >/dev/null || break; sleep 0.1; done
  if live_pid "$1" >/dev/null; then log "$1 ($p) ignored SIGTERM, killing it"; kill -KILL "$p"; sleep 0.3; fi
  rm -f "$DIR/pids/$1"
}
nodes() { local i; for ((i = 1; i <= NODES; i++)); do echo "$PREFIX$i"; done; }
load_params() { [ -r "$DIR/params" ] && . "$DIR/params"; }
slurm() { SLURM_CONF=$CONF timeout "${T:-15}" "$@"; }

# ---------------------------------------------------------------- installation
missing() { # packages of which a command is not here
  local b
  for b in slurmctld:slurmctld slurmd:slurmd srun:slurm-client sbatch:slurm-client munged:munge \
           unshare:util-linux setsid:util-linux ip:iproute2 ss:iproute2 ${ALSO_INSTALL:-}; do
    command -v "${b%%:*}" >/dev/null || echo "${b##*:}"
  done | sort -u
}
update_lists() { # apt-get waits for no other process that holds the lock of the lists: try again for two minutes
  local i out
  for ((i = 0; i < 24; i++)); do
    out=$("$@" update 2>&1) && { echo "$out"; return 0; }
    echo "$out"
    [[ $out == *"Could not get lock"* ]] || return 1
    sleep 5
  done
  return 1
}
install() { # one process at a time, whatever lab it is for; the second finds everything there
  local record=$1 guard= need rc
  need=$(missing)
  [ -n "$need" ] || return 0
  [ "$(id -u)" -eq 0 ] || die "missing: ${need//$'\n'/ }; only root can install them"
  command -v apt-get >/dev/null || die "missing: ${need//$'\n'/ }; there is no apt-get to install them"
  mkdir -p /run/lock; exec 8>/run/lock/slurm-lab-install; flock -w 600 8 || die "another process has been installing packages for 600 s"
  need=$(missing)
  [ -n "$need" ] || { exec 8>&-; return 0; }
  log "installing: ${need//$'\n'/ }"
  if [ ! -e /usr/sbin/policy-rc.d ]; then     # keep the packages from starting their own services
    guard=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$guard && chmod 755 $guard
  fi
  ( exec 8>&- 9>&-; export DEBIAN_FRONTEND=noninteractive
    A=(apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::Retries=3)
    update_lists "${A[@]}" && "${A[@]}" install -y --no-install-recommends $need ) >"$record" 2>&1
  rc=$?; [ -n "$guard" ] && rm -f "$guard"
  [ $rc -eq 0 ] || { tail -5 "$record" >&2; die "apt-get failed"; }
  exec 8>&-
}
cmd_install() { # for `make test`: without the rights to install, the tests that need it are skipped
  if [ -n "$(missing)" ] && { [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; }; then
    log "not installed: $(missing | tr '\n' ' ')- tests that need it are skipped; root can install them with apt-get"
    return 0
  fi
  local out; out=$(mktemp); install "$out"; rm -f "$out"
}

# ---------------------------------------------------------------- isolation
NS_FLAGS="--uts --mount --propagation slave --pid --fork --kill-child --mount-proc"
can_ns()    { unshare $NS_FLAGS sh -c 'hostname x && mount --bind /etc/hostname /etc/hosts' 2>/dev/null; }
can_netns() {
  local n=sl$TAG-probe ok=1
  ip netns add $n 2>/dev/null && ip link add "sl${TAG}p" type bridge 2>/dev/null &&
    ip link add "sl${TAG}q" type veth peer name eth0 netns $n 2>/dev/null && ok=0
  ip link del "sl${TAG}q" 2>/dev/null; ip link del "sl${TAG}p" 2>/dev/null; ip netns del $n 2>/dev/null
  return $ok
}
choose_isolation() {
  case $1 in
    auto) if can_ns; then if can_netns; then echo netns; else echo hostnet; fi; else echo plain; fi;;
    netns|hostnet|plain) echo "$1";;
    *) die "isolation must be auto, netns, hostnet or plain";;
  esac
}
BR=slb$TAG
net_up() {
  [ "$ISOLATION" = netns ] || return 0
  local i=0 n
  ip link show "$BR" >/dev/null 2>&1 || { ip link add "$BR" type bridge && ip addr add "$SUBNET.254/24" dev "$BR"; } ||
    die "cannot make bridge $BR"
  ip link set "$BR" up
  for n in $(nodes); do
    i=$((i + 1))
    [ -e "/run/netns/sl$TAG-$n" ] && continue
    ip netns add "sl$TAG-$n" && ip -n "sl$TAG-$n" link set lo up &&
      ip link add "sl${TAG}v$i" type veth peer name eth0 netns "sl$TAG-$n" &&
      ip link set "sl${TAG}v$i" master "$BR" up &&
      ip -n "sl$TAG-$n" addr add "$SUBNET.$i/24" dev eth0 && ip -n "sl$TAG-$n" link set eth0 up ||
      die "cannot make the network of $n"
  done
}
net_down() {
  [ "${ISOLATION:-}" = netns ] || return 0
  local i=0 n
  for n in $(nodes); do
    i=$((i + 1)); ip link del "sl${TAG}v$i" 2>/dev/null; ip netns del "sl$TAG-$n" 2>/dev/null
  done
  ip link del "$BR" 2>/dev/null; return 0
}
hosts_clean() { # drop this lab's lines from /etc/hosts, in place (it may be a bind mount)
  grep -q "# slurm-lab $TAG\$" /etc/hosts 2>/dev/null || return 0
  local t; t=$(grep -v "# slurm-lab $TAG\$" /etc/hosts); printf '%s\n' "$t" >/etc/hosts
}
addr_of() { if [ "$ISOLATION" = netns ]; then echo "$SUBNET.$1"; else echo "127.77.0.$1"; fi; }

# ---------------------------------------------------------------- configuration
free_port_base() { # N+1 free consecutive ports, outside 15000-24999 (Lightning's MASTER_PORT) and 32768+ (ephemeral)
  local used b i k; used=" $(ss -Hltn | sed -E 's/^[^ ]+ +[^ ]+ +[^ ]+ +[^ ]*:([0-9]+) .*/\1/' | tr '\n' ' ') "
  for ((k = 0; k < 70; k++)); do
    b=$((25000 + (HNUM + k) % 70 * 100))
    for ((i = 0; i <= NODES; i++)); do [[ $used == *" $((b + i)) "* ]] && continue 2; done
    echo $b; return 0
  done
  return 1
}
free_subnet() { # RFC 2544 test range, 198.18.0.0/15
  local k s a; a=$(ip -4 -o addr; ip -4 route)
  for ((k = 0; k < 500; k++)); do
    s=198.$((18 + (HNUM + k) / 250 % 2)).$(((HNUM + k) % 250))
    [[ $a == *"$s."* ]] || { echo $s; return 0; }
  done
  return 1
}
write_conf() {
  local i=0 n mem ctl_addr gres=
  mem=$(awk '/^MemTotal/{print int($2 / 1024)}' /proc/meminfo)
  ctl_addr=127.0.0.1; [ "$ISOLATION" = netns ] && ctl_addr=$SUBNET.254
  : >"$DIR/conf/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    mkdir -p "$DIR/conf/gpu"; for ((i = 0; i < GPUS; i++)); do rm -f "$DIR/conf/gpu/nv$i"; mknod "$DIR/conf/gpu/nv$i" c 1 3; done
    if [ "$GPUS" -eq 1 ]; then n=nv0; else n="nv[0-$((GPUS - 1))]"; fi
    echo "Name=gpu File=$DIR/conf/gpu/$n" >"$DIR/conf/gres.conf"; gres="Gres=gpu:$GPUS"; i=0
  fi
  {
    cat <<EOF
ClusterName=lab
SlurmctldHost=$(hostname -s)($ctl_addr)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$RUN/munge.sock,cred_expire=${SLURM_LAB_CRED_EXPIRE:-10}
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmdSpoolDir=$RUN/spool/%n
StateSaveLocation=$DIR/ctld
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=${SLURM_LAB_KILLWAIT:-10}
MessageTimeout=30
SlurmctldTimeout=60
SlurmdTimeout=${SLURM_LAB_NODE_TIMEOUT:-60}
MinJobAge=86400
FirstJobId=$((1000 + HNUM % 80 * 100))
MailProg=/bin/true
${gres:+GresTypes=gpu}
EOF
    i=0
    for n in $(nodes); do
      i=$((i + 1))
      echo "NodeName=$n NodeHostname=$n NodeAddr=$([ "$ISOLATION" = netns ] && addr_of $i || echo 127.0.0.1)" \
           "Port=$((PORT + i)) CPUs=$CPUS RealMemory=$mem $gres State=UNKNOWN"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=2"
    # Jobs of these two make room for those of the first: after a while to end by themselves, and at once.
    echo "PartitionName=graceful Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60"
    echo "PartitionName=graceless Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1"
  } >"$CONF.new" && mv "$CONF.new" "$CONF"
  { echo "127.0.0.1 localhost"; echo "::1 localhost ip6-localhost"
    [ "$ISOLATION" = netns ] && echo "$SUBNET.254 $(hostname -s)"
    i=0; for n in $(nodes); do i=$((i + 1)); echo "$(addr_of $i) $n"; done; } >"$DIR/conf/hosts"
  cat >"$DIR/conf/node-init.sh" <<'EOF'
# PID 1 of a node: own host name, /etc/hosts, /dev/shm; reaps orphans. It outlives its slurmd, as a machine does; when it
# ends, every process of the node ends.    arguments: NODE SLURM_CONF DIR PIDFILE
hostname "$1"; mount --bind "$3/conf/hosts" /etc/hosts || exit 1
[ -d /dev/shm ] && mount -t tmpfs -o mode=1777 shm /dev/shm
halt() {
  daemon=$(cat "$4" 2>/dev/null) && kill -TERM "$daemon" 2>/dev/null && while kill -0 "$daemon" 2>/dev/null; do sleep 0.1; done
  exit
}
trap 'halt "$@"' TERM INT
slurmd -D -f "$2" -N "$1" >/dev/null &
while :; do sleep infinity & wait $!; done
EOF
}

# ---------------------------------------------------------------- commands
listens() { # index of a node: its slurmd has its port open (asked of the kernel: a test connection would be logged as an error)
  local pre=; [ "$ISOLATION" = netns ] && pre="nsenter --net=/run/netns/sl$TAG-$PREFIX$1"
  [ -n "$($pre ss -Hltn "sport = :$((PORT + $1))" 2>/dev/null)" ]
}
all_idle() { # every node's slurmd runs and listens, and slurmctld is ready to give it work
  local s i; for ((i = 1; i <= NODES; i++)); do live_pid "node-$PREFIX$i" >/dev/null && listens $i || return 1; done
  s=$(T=5 slurm sinfo -h -N -o '%N %T' 2>/dev/null | sort -u) || return 1 # a line for each partition
  [ "$(printf '%s\n' "$s" | grep -cE '^[^ ]+ (idle|mixed|allocated|completing)$')" -eq "$NODES" ]
}
cmd_up() {
  [ "$(id -u)" -eq 0 ] || die "must be root"
  mkdir -p "$DIR"/{conf,ctld,log,pids} || die "cannot make $DIR"
  exec 9>"$DIR/lock"; flock -w 180 9 || die "another slurm-lab works on $DIR"
  local t0=$SECONDS want_n want_c want_g want_p want_i have=
  load_params && have=1
  want_n=${o_n:-${SLURM_LAB_NODES:-${NODES:-2}}};      want_c=${o_c:-${SLURM_LAB_CPUS:-${CPUS:-$(nproc)}}}
  want_g=${o_g:-${SLURM_LAB_GPUS:-${GPUS:-0}}};        want_p=${o_p:-${SLURM_LAB_PREFIX:-${PREFIX:-node}}}
  want_i=${o_i:-${SLURM_LAB_ISOLATION:-${ASKED:-auto}}}
  [[ $want_n =~ ^[0-9]+$ && $want_n -ge 1 && $want_n -le 64 ]] || die "-n: 1 to 64"
  [[ $want_c =~ ^[0-9]+$ && $want_c -ge 1 ]] || die "-c: a number"; [[ $want_g =~ ^[0-9]+$ ]] || die "-g: a number"
  [[ $want_p =~ ^[a-z][a-z-]*$ ]] || die "-p: lower-case letters and dashes"
  if [ -n "$have" ] && live_pid slurmctld >/dev/null; then
    [ "$want_n $want_c $want_g $want_p $want_i" = "$NODES $CPUS $GPUS $PREFIX $ASKED" ] ||
      die "already up with other settings ($NODES nodes, $CPUS CPUs, $GPUS GPUs, $PREFIX, $ASKED): run down first"
    if cmd_status >/dev/null 2>&1; then log "already up: export SLURM_CONF=$CONF"; return 0; fi
  else
    [ -n "$have" ] && teardown      # leftovers of a lab or machine that died
    install "$DIR/log/install.log"
    NODES=$want_n CPUS=$want_c GPUS=$want_g PREFIX=$want_p ASKED=$want_i
    ISOLATION=$(choose_isolation "$ASKED") || exit 1
    PORT=$(free_port_base) || die "no free ports"; SUBNET=$(free_subnet) || die "no free subnet"
    # unix sockets live in RUN and their paths are limited to 107 bytes
    RUN=$DIR/run; [ ${#DIR} -le 50 ] || RUN=$(mktemp -d /tmp/slab.XXXXXX)
    chmod 755 "$RUN" 2>/dev/null
    printf '%s=%q\n' NODES "$NODES" CPUS "$CPUS" GPUS "$GPUS" PREFIX "$PREFIX" ASKED "$ASKED" \
      ISOLATION "$ISOLATION" PORT "$PORT" SUBNET "$SUBNET" RUN "$RUN" >"$DIR/params"
    write_conf || die "cannot write $CONF"
  fi
  mkdir -p "$RUN/spool"; local n i; for n in $(nodes); do mkdir -p "$RUN/spool/$n"; done
  net_up
  hosts_clean
  if [ "$ISOLATION" = plain ]; then
    i=0; for n in $(nodes); do i=$((i + 1)); echo "$(addr_of $i) $n # slurm-lab $TAG" >>/etc/hosts; done
  fi
  if ! live_pid munged >/dev/null; then
    [ -s "$DIR/conf/munge.key" ] || (umask 077; head -c 256 /dev/urandom >"$DIR/conf/munge.key")
    rm -f "$RUN"/munge.sock*
    spawn munged "$DIR/log/munged.log" munged --foreground --force --socket="$RUN/munge.sock" \
      --key-file="$DIR/conf/munge.key" --pid-file="$RUN/munged.pid" --seed-file="$DIR/conf/munge.seed"
  fi
  for ((i = 0; i < 100; i++)); do munge -S "$RUN/munge.sock" -n >/dev/null 2>&1 && break; sleep 0.1; done
  munge -S "$RUN/munge.sock" -n >/dev/null || die "munged does not answer, see $DIR/log/munged.log"
  live_pid slurmctld >/dev/null || spawn slurmctld /dev/null slurmctld -D -f "$CONF"
  for n in $(nodes); do
    live_pid "node-$n" >/dev/null && continue
    case $ISOLATION in
      netns)   spawn "node-$n" "$DIR/log/node-$n.log" nsenter --net="/run/netns/sl$TAG-$n" \
                 unshare $NS_FLAGS bash "$DIR/conf/node-init.sh" "$n" "$CONF" "$DIR" "$RUN/slurmd.$n.pid";;
      hostnet) spawn "node-$n" "$DIR/log/node-$n.log" \
                 unshare $NS_FLAGS bash "$DIR/conf/node-init.sh" "$n" "$CONF" "$DIR" "$RUN/slurmd.$n.pid";;
      plain)   spawn "node-$n" /dev/null slurmd -D -f "$CONF" -N "$n";;
    esac
  done
  # slurmctld asks a node that was cut off for its state only now and then: two minutes
  for ((i = 0; i < 480; i++)); do all_idle && break; sleep 0.25; done
  if ! all_idle; then cmd_status >&2; die "nodes not ready, see $DIR/log"; fi
  log "up in $((SECONDS - t0)) s: $NODES nodes, isolation $ISOLATION; export SLURM_CONF=$CONF"
}
teardown() {
  local n
  for n in $(nodes); do stop "node-$n" 5; done      # in a namespace this ends every process of the node
  stop slurmctld 15; stop munged 5
  net_down; hosts_clean
  case $RUN in /tmp/slab.??????) rm -rf -- "$RUN";; "$DIR/run") rm -rf -- "$DIR/run";; esac
}
cmd_down() {
  load_params || { log "not up ($DIR)"; return 0; }
  exec 9>"$DIR/lock"; flock -w 180 9 || die "another slurm-lab works on $DIR"
  local i w=5; [ "$ISOLATION" = plain ] && w=$((${SLURM_LAB_KILLWAIT:-10} + 10))
  if live_pid slurmctld >/dev/null; then
    for i in pending running suspended; do T=10 slurm scancel --state=$i >/dev/null 2>&1; done
    for ((i = 0; i < w * 4; i++)); do [ -z "$(T=5 slurm squeue -h 2>/dev/null)" ] && break; sleep 0.25; done
  fi
  teardown
  log "down"
}
cmd_status() {
  load_params || { echo "not set up ($DIR)"; return 3; }
  local n p up=0 all=$((NODES + 2))
  for n in munged slurmctld $(nodes | sed 's/^/node-/'); do
    if p=$(live_pid "$n"); then echo "$n: running, pid $p"; up=$((up + 1)); else echo "$n: not running"; fi
  done
  [ $up -gt 0 ] || return 3
  echo "isolation $ISOLATION, SLURM_CONF=$CONF"
  T=10 slurm sinfo -N -l; T=10 slurm squeue
  [ $up -eq $all ] && all_idle
}
case $cmd in
  install) cmd_install;;
  up) cmd_up;;
  down) cmd_down;;
  status) cmd_status;;
  env) echo "export SLURM_CONF=$CONF";;
  exec) [ $# -gt 0 ] || die "exec needs a command"; SLURM_CONF=$CONF exec "$@";;
  -h|--help|help|'') usage; [ -n "$cmd" ] || exit 2;;
  *) die "unknown subcommand $cmd (install, up, down, status, env, exec)";;
esac
