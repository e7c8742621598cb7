# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What is spent while little or nothing is to be done: the CPU of workers of
# which 100 keys are due each second, by the number of keys that are held; and
# how often our processes wake up when nothing is due.

# Nanoseconds that a process was on a CPU.
cpu_time() {
	cut -d ' ' -f 1 "/proc/$1/schedstat"
}

worker_of() {
	ask "SELECT pid FROM sb_stat_buffers WHERE relid = '$1'::regclass AND pid IS NOT NULL"
}

# --- wake-ups ---------------------------------------------------------------

our_processes() {
	PGPORT=$quiet_port ask "SELECT pid FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer %' ORDER BY pid"
}

# How often they gave up the CPU to wait, all together.
wake_ups() {
	local pid
	for pid in $(our_processes); do
		cat "/proc/$pid/status"
	done | awk '/^voluntary_ctxt_switches/ { sum += $2 } END { print sum + 0 }'
}

# A server with workers that stay: of one buffer that holds keys, and of one
# that has none.  Returns when they have settled down.
start_quiet_server() {
	local before now i
	port=$quiet_port bench_server quiet "shared_preload_libraries = 'statbuffer'"
	quiet_data=$PGDATA
	export PGPORT=$quiet_port
	load idle.sql
	perform "INSERT INTO idle_holding SELECT 'key ' || n, 1 FROM generate_series(1, $ten_thousand) AS n"
	perform "SELECT sb_increment('key', 1, 'idle_empty')"
	perform "SELECT sb_start('idle_holding')"
	drain idle_empty
	now=$(wake_ups)
	for ((i = 0; i < 30; i++)); do
		before=$now
		sleep 2
		now=$(wake_ups)
		[ "$now" != "$before" ] || break
	done
	must_be "processes that wait" 3 \
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer %'"
}

# --- keys that are due ------------------------------------------------------

# idle_fill BUFFER N: with the buffer's name in the keys, as all are stored in
# one table.
idle_fill() {
	perform "INSERT INTO $1 SELECT '$1 ' || n, 1 FROM generate_series(1, $2) AS n"
	filled[$1]=$((${filled[$1]:-0} + $2))
}

measure_idle() {
	local ticks=30 interval=40 window=25 quiet_for=60 quiet_port=5433 quiet_data
	local buffer tick began quiet_began quiet_before quiet_pids stored
	local -A filled pid before flushed
	[ -z "$quick" ] || { ticks=1 interval=3 window=1 quiet_for=3; }

	start_quiet_server
	quiet_pids=$(our_processes)
	quiet_before=$(wake_ups)
	quiet_began=$SECONDS

	port=5432 bench_server idle "shared_preload_libraries = 'statbuffer'"
	load idle.sql
	sql -c "ALTER FOREIGN TABLE once_million OPTIONS (SET interval '${interval}s')" \
		-c "ALTER FOREIGN TABLE once_few OPTIONS (SET interval '${interval}s')"
	# 100 of these are due each second, one by one: spread over the jitter
	idle_fill spread_million "$million"
	idle_fill spread_few "$ten_thousand"
	# 100 keys each second, to be due at once an interval later; and then the
	# keys that are due after that
	began=$SECONDS
	for ((tick = 1; tick <= ticks; tick++)); do
		for buffer in once_million once_few; do
			perform "INSERT INTO $buffer SELECT '$buffer $tick due ' || n, 1 FROM generate_series(1, 100) AS n"
			filled[$buffer]=$((${filled[$buffer]:-0} + 100))
		done
		while ((SECONDS < began + tick)); do sleep 0.1; done
	done
	idle_fill once_million "$million"
	idle_fill once_few "$ten_thousand"

	while ((SECONDS <= began + interval)); do sleep 0.1; done
	for buffer in "${!filled[@]}"; do
		pid[$buffer]=$(worker_of "$buffer")
		[ -n "${pid[$buffer]}" ] || die "$group: $buffer has no worker"
		before[$buffer]=$(cpu_time "${pid[$buffer]}")
		flushed[$buffer]=$(ask "SELECT flushed_keys FROM sb_stat_buffers WHERE relid = '$buffer'::regclass")
	done
	sleep "$window"
	for buffer in "${!filled[@]}"; do
		record "${buffer/_/-}" worker 1 '% of a core' \
			"$(awk -v ns=$(($(cpu_time "${pid[$buffer]}") - before[$buffer])) -v s="$window" 'BEGIN { print ns / s / 1e7 }')"
		stored=$(ask "SELECT flushed_keys FROM sb_stat_buffers WHERE relid = '$buffer'::regclass")
		record "${buffer/_/-}" flushed 1 'keys/s' "$(awk -v n=$((stored - flushed[$buffer])) -v s="$window" 'BEGIN { print n / s }')"
	done
	for buffer in "${!filled[@]}"; do
		must_have_counted "$buffer" "${filled[$buffer]}"
		# its worker goes on
		stored=$(ask "SELECT flushed_count FROM sb_stat_buffers WHERE relid = '$buffer'::regclass")
		must_be_true "what $buffer has stored is in the table" \
			"SELECT coalesce(sum(n), 0) >= $stored FROM stored WHERE key LIKE '$buffer %'"
		perform "TRUNCATE $buffer"
	done

	while ((SECONDS <= quiet_began + quiet_for)); do sleep 0.1; done
	record wake-ups all "$quiet_for" wake-ups $(($(wake_ups) - quiet_before))
	[ "$(our_processes)" = "$quiet_pids" ] || die "$group: other processes wait than before"
	stop_server
	export PGDATA=$quiet_data
	stop_server
}
