# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# Transactions a second, by clients: the increment, a function that does
# nothing, and the other ways to count.

# The increment, and what there must be of each table in the end.
declare -A counted

# throughput_run WHAT WHO CLIENTS: WHAT is one (key), uniform, zipf (of 10,000
# keys), hundred (increments of one key in a transaction), or pipelined (sixteen
# of them).
throughput_run() {
	local what=$1 who=$2 clients=$3 script=$2 table=$2 options='' size=1

	case $what in
	hundred) size=100 ;;
	pipelined) size=$pipeline_size ;;
	esac
	case $who in
	redis)
		redis_run "$what" "$clients" "$size"
		return
		;;
	statbuffer | no-op)
		script=increment
		options=$(search_path_of "$who")
		;;
	update*)
		script=update
		table=${who//-/_}.hot
		options="-c search_path=${who//-/_},public"
		[ "$who" != update-async ] || options+=' -c synchronous_commit=off'
		;;
	append)
		start_roll_up
		;;
	esac
	script=$root/bench/$script.pgbench
	case $what in
	uniform | zipf | hundred) script=${script%.pgbench}_$what.pgbench ;;
	pipelined)
		pipeline "$size" "$script" >"$work/pipelined.pgbench"
		script=$work/pipelined.pgbench
		;;
	esac
	PGOPTIONS=$options run_pgbench "$clients" -f "$script" -D keys="$ten_thousand"
	[ "$who" != append ] || stop_roll_up
	counted[$table]=$((${counted[$table]:-0} + ntransactions * size))
	record "$what" "$who" "$clients" 'increments/s' "$(awk -v tps="$tps" -v size="$size" 'BEGIN { print tps * size }')"
}

pipeline_size=16

# Every second, as a job of its own would do it.
start_roll_up() {
	perform "TRUNCATE appended"
	psql -X -q -v ON_ERROR_STOP=1 -f "$root/bench/roll_up.sql" >"$work/log/roll_up.log" 2>&1 </dev/null &
	roll_up=$!
}

# In the middle of a transaction or not: what it moves is in one place or the
# other.
stop_roll_up() {
	kill -0 "$roll_up" 2>/dev/null || {
		cat "$work/log/roll_up.log"
		die "$group: rolling up failed"
	}
	kill "$roll_up"
	wait "$roll_up" 2>/dev/null || :
	must_be_true "nobody rolls up any more" \
		"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE query LIKE 'WITH taken%' UNION ALL SELECT true LIMIT 1"
	sql -c "$(sed '/^\\/d' "$root/bench/roll_up.sql")"
}

# --- Redis ------------------------------------------------------------------

redis() {
	redis-cli -s "$work/tmp/redis" "$@"
}

# It listens on a socket only, as our server does, and writes nothing to disk.
start_redis() {
	redis-server --port 0 --unixsocket "$work/tmp/redis" --save '' --appendonly no \
		--dir "$work/tmp" --logfile "$work/log/redis.log" </dev/null >/dev/null &
	redis_server=$!
	local i
	for ((i = 0; i < 100; i++)); do
		! redis ping >/dev/null 2>&1 || return 0
		sleep 0.1
	done
	cat "$work/log/redis.log"
	die "could not start redis-server"
}

stop_redis() {
	redis shutdown nosave >/dev/null 2>&1 || :
	wait "$redis_server" || :
}

redis_benchmark() { # CLIENTS PIPELINE REQUESTS
	redis-benchmark -s "$work/tmp/redis" -c "$1" -P "$2" -n "$3" --csv incr x </dev/null 2>&1 |
		sed -n 's/^"incr x","\([0-9.]*\)".*/\1/p'
}

# It takes a number of requests and not a time; how many go into the time, a
# short run tells.
redis_run() {
	local what=$1 clients=$2 size=$3 n=20000 unit rate

	# it makes the number whole by these
	unit=$((size * clients))
	n=$((n - n % unit))
	rate=$(redis_benchmark "$clients" "$size" "$n")
	counted[redis]=$((${counted[redis]:-0} + n))
	if [ -z "$quick" ]; then
		n=$(awk -v rate="$rate" -v seconds="$seconds" -v unit="$unit" \
			'BEGIN { printf "%d", int(rate * seconds / unit + 1) * unit }')
		rate=$(redis_benchmark "$clients" "$size" "$n")
		counted[redis]=$((counted[redis] + n))
	fi
	record "$what" redis "$clients" 'increments/s' "$rate"
}

# --- rounds -----------------------------------------------------------------

# What targets are about, in every round.
throughput_often=(
	'one no-op 64' 'one statbuffer 64'
	'one no-op 256' 'one statbuffer 256'
	'one update 64' 'one redis 64'
)

# Half as long, in three rounds.
throughput_ours=(
	'one no-op 1' 'one statbuffer 1' 'one no-op 8' 'one statbuffer 8'
	'uniform no-op 64' 'uniform statbuffer 64' 'zipf no-op 64' 'zipf statbuffer 64'
	'pipelined no-op 64' 'pipelined statbuffer 64' 'pipelined redis 64'
	'hundred no-op 64' 'hundred statbuffer 64' 'hundred update 64'
)

# What is far from ours: half as long, in two rounds.
throughput_others=(
	'one update 1' 'one update 8' 'one update 256'
	'one update-unlogged 1' 'one update-unlogged 8' 'one update-unlogged 64' 'one update-unlogged 256'
	'one update-async 1' 'one update-async 8' 'one update-async 64' 'one update-async 256'
	'one slotted 1' 'one slotted 8' 'one slotted 64' 'one slotted 256'
	'one append 1' 'one append 8' 'one append 64' 'one append 256'
	'one nextval 1' 'one nextval 8' 'one nextval 64' 'one nextval 256'
	'one redis 1' 'one redis 8' 'one redis 256'
)

throughput_quick=(
	'one no-op 8' 'one statbuffer 8' 'uniform statbuffer 8' 'zipf statbuffer 8'
	'one update 8' 'one update-unlogged 8' 'one update-async 8' 'one slotted 8' 'one append 8'
	'one nextval 8' 'pipelined statbuffer 8' 'hundred statbuffer 8' 'hundred update 8'
	'one redis 8' 'pipelined redis 8'
)

# throughput_cells CELL...
throughput_cells() {
	local cell
	while read -r -a cell; do
		if [ "${cell[1]}" != redis ] || [ -n "$with_redis" ]; then
			throughput_run "${cell[@]}"
		fi
	done < <(in_turn "$@")
}

throughput_round() {
	if [ -n "$quick" ]; then
		throughput_cells "${throughput_quick[@]}"
		return
	fi
	throughput_cells "${throughput_often[@]}"
	local seconds=$(((seconds + 1) / 2))
	((round > 3)) || throughput_cells "${throughput_ours[@]}"
	((round > 2)) || throughput_cells "${throughput_others[@]}"
}

measure_throughput() {
	with_redis=
	! command -v redis-server >/dev/null || with_redis=yes
	[ -n "$with_redis" ] || say "redis-server is not installed; leaving it out"
	bench_server throughput
	load throughput.sql
	[ -z "$with_redis" ] || start_redis

	each_round throughput_round

	drain hits
	must_have_counted hits "${counted[statbuffer]}"
	must_be "the sum of what is stored" "${counted[statbuffer]}" "SELECT sum(n) FROM stored"
	local table
	for table in update.hot update_unlogged.hot update_async.hot slotted; do
		must_be "the sum of $table" "${counted[$table]}" "SELECT sum(n) FROM $table"
	done
	must_be "what was appended" "${counted[append]}" "SELECT sum(n) FROM totals"
	must_be "the sequence" "${counted[nextval]}" "SELECT last_value FROM numbers"
	if [ -n "$with_redis" ]; then
		[ "$(redis get x)" = "${counted[redis]}" ] || die "$group: Redis has counted $(redis get x), should be ${counted[redis]}"
		stop_redis
	fi
	stop_server
}
