# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# How cost grows: of an increment with the keys held, of a flush with the keys
# due, of a transaction with the keys in it; what a flush does to the latency of
# others' commits, and what the making of keys does to it.

# --- with the keys held -----------------------------------------------------

# A statement of a million increments of random keys among those that are held.
growth_held_run() { # WHO HELD
	export PGOPTIONS
	PGOPTIONS=$(search_path_of "$1")
	record held "$1" "$2" ns/increment "$(milliseconds_without_rows \
		"SELECT sb_increment('key ' || (random() * ($2 - 1))::integer, 1, 'held') FROM generate_series(1, $million)" |
		awk -v n="$million" '{ print $1 * 1e6 / n }')"
	unset PGOPTIONS
}

# growth_round RUN SIZE: each in its turn
growth_round() {
	local who
	while read -r who; do
		"$1" "$who" "$2"
	done < <(in_turn no-op statbuffer)
}

growth_held() {
	local held=0 size upto
	for size in "${held_sizes[@]}"; do
		while ((held < size)); do
			upto=$((held + million < size ? held + million : size))
			perform "INSERT INTO held SELECT 'key ' || n, 1 FROM generate_series($held, $((upto - 1))) AS n"
			held=$upto
		done
		each_round growth_round growth_held_run "$size"
		must_be "the keys held" "$held" "SELECT keys FROM sb_stat_buffers WHERE buffer = 'held'"
	done
	must_have_counted held $((held + ${#held_sizes[@]} * rounds * million))
	perform "DROP FOREIGN TABLE held"
}

# --- with the keys due ------------------------------------------------------

growth_due_round() {
	local size=$1
	perform "TRUNCATE stored"
	perform "CHECKPOINT"
	perform "INSERT INTO due SELECT 'key ' || n, 1 FROM generate_series(1, $size) AS n"
	record due statbuffer "$size" ms/flush "$(milliseconds "SELECT sb_drain('due')")"
	must_be "what is stored" "$size $size" "SELECT count(*) || ' ' || sum(n) FROM stored"
}

growth_due() {
	local size
	perform "SELECT sb_increment('first', 1, 'due')"
	drain due
	for size in "${due_sizes[@]}"; do
		each_round growth_due_round "$size"
	done
	perform "TRUNCATE due"
}

# --- with the keys in a transaction -----------------------------------------

growth_keys_run() { # WHO KEYS
	local times=$((hundred_thousand / $2))
	((times < 2000)) || times=2000
	((times > 5)) || times=5
	PGOPTIONS=$(search_path_of "$1") pgbench_amount="-t $times" \
		run_pgbench 1 -f "$root/bench/increment_many.pgbench" -D keys="$2"
	record keys "$1" "$2" us/transaction "$(awk -v tps="$tps" 'BEGIN { print 1e6 / tps }')"
	[ "$1" = no-op ] || many=$((many + times * $2))
}

growth_keys() {
	local size many=0
	for size in "${keys_sizes[@]}"; do
		each_round growth_round growth_keys_run "$size"
	done
	must_have_counted many "$many"
	perform "TRUNCATE many"
}

# --- latency of commits -----------------------------------------------------

latency_percentiles=(50 75 90 95 99 99.5 99.9 99.95 99.99 100)

# latency_of WHAT WHO FROM TO: of the transactions that ended between these
# times, from the sorted log; as they took, not as they waited for their turn.
latency_of() {
	local percentile us
	awk -v from="$3" -v to="$4" '{ at = $5 + $6 / 1e6 } $2 > 5 && at >= from && at < to { print $3 - $7 }' \
		"$work"/log/latency.* | sort -n >"$work/sorted"
	[ -s "$work/sorted" ] || die "$group: no transactions $2"
	for percentile in "${latency_percentiles[@]}"; do
		us=$(awk -v p="$percentile" '{ v[NR] = $1 } END { n = int(NR * p / 100 + 0.9999999); print v[n < 1 ? 1 : n] }' "$work/sorted")
		record "$1" "$2" "$percentile" us "$us"
	done
	record "$1" "$2" 1 transactions "$(wc -l <"$work/sorted")"
}

# Clients that count a hundred thousand keys, each any; all of these are flushed
# in the middle.  Either as fast as they can, or at a rate that leaves room.
latency_round() {
	local what rate began from to run flushed transactions=$work/latency-transactions
	for what in commit-busy commit-room; do
		rate=()
		[ "$what" = commit-busy ] || rate=(-R 5000)
		perform "INSERT INTO latency SELECT 'key ' || n, 1 FROM generate_series(1, $hundred_thousand) AS n"
		perform "CHECKPOINT"
		(
			pgbench_amount="-T $latency_seconds" run_pgbench 8 -f "$root/bench/increment_latency.pgbench" \
				-D keys="$hundred_thousand" "${rate[@]}" -l --log-prefix="$work/log/latency"
			echo "$ntransactions" >"$transactions"
		) &
		run=$!
		# the clients are under way
		while ! ls "$work"/log/latency.* >/dev/null 2>&1; do sleep 0.01; done
		began=$(date +%s.%N)
		sleep "$((latency_seconds / 3)).5"
		from=$(date +%s.%N)
		flushed=$(ask "SELECT flushed_keys FROM sb_stat_buffers WHERE buffer = 'latency'")
		drain latency
		to=$(date +%s.%N)
		must_be_true "a flush of all keys" \
			"SELECT flushed_keys - $flushed >= $hundred_thousand FROM sb_stat_buffers WHERE buffer = 'latency'"
		wait "$run" || die "$group: pgbench failed"
		latency_counted=$((latency_counted + hundred_thousand + $(<"$transactions")))
		latency_of "$what" without-flush "$began" "$from"
		latency_of "$what" with-flush "$from" "$to"
		record "$what" flush 1 ms "$(awk -v from="$from" -v to="$to" 'BEGIN { print (to - from) * 1000 }')"
		rm "$work"/log/latency.*
	done
}

growth_latency() {
	local latency_counted=0 latency_seconds=$((seconds * 2 + 1))
	[ -z "$quick" ] || latency_seconds=2
	perform "TRUNCATE stored"
	each_round latency_round
	drain latency
	must_have_counted latency "$latency_counted"
	must_be "what is stored" "$hundred_thousand $latency_counted" "SELECT count(*) || ' ' || sum(n) FROM stored"
}

# --- commits while the table grows --------------------------------------------

# commits_beside SECONDS STATEMENT: runs it while four clients count, for so many
# seconds or until they are done, whichever is longer.  Sets answer to what it
# selects, and leaves the latencies of transactions that ended meanwhile, in
# microseconds and sorted, in $work/sorted.  There is room for both: what is
# measured is how long they wait for each other.
commits_beside() {
	local run from to transactions=$work/commits-transactions
	(
		pgbench_amount="-T $1" run_pgbench 4 -f "$root/bench/increment_growing.pgbench" -D keys=1000 \
			-R 1000 -l --log-prefix="$work/log/commits"
		echo "$ntransactions" >"$transactions"
	) &
	run=$!
	# the clients are under way
	sleep 1
	from=$(date +%s.%N)
	answer=$(ask "$2")
	to=$(date +%s.%N)
	wait "$run" || die "$group: pgbench failed"
	commits_counted=$((commits_counted + $(<"$transactions")))
	awk -v from="$from" -v to="$to" '{ at = $5 + $6 / 1e6 } $2 > 5 && at >= from && at < to { print $3 - $7 }' \
		"$work"/log/commits.* | sort -n >"$work/sorted"
	[ -s "$work/sorted" ] || die "$group: no transactions beside $2"
	rm "$work"/log/commits.*
}

# record_commits WHAT N
record_commits() {
	record "$1" p99.9 "$2" ms "$(awk '{ v[NR] = $1 } END { print v[int(NR * 0.999) + 1] / 1000 }' "$work/sorted")"
	record "$1" worst "$2" ms "$(awk '{ v = $1 } END { print v / 1000 }' "$work/sorted")"
}

# Keys that are made one by one, up to so many of them, and then all in one
# transaction.  The clients count the first thousand.  What they meet without
# growth is measured beside a session that counts these, too, as fast as it can.
commits_round() {
	local made=1000 upto commits_counted=0 answer worst=0 worst_call=0
	perform "CREATE FOREIGN TABLE growing (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h', timeout '1h')"
	perform "SELECT make_keys(1, 1000)"
	commits_beside 4 "SELECT make_keys(1, $million, 1000)"
	record_commits commit-growing 0
	record call-growing worst 0 ms "$answer"
	commits_counted=$((commits_counted + million))
	for upto in "${growing_sizes[@]}"; do
		commits_beside $((2 + (upto - made) / 250000)) "SELECT make_keys($((made + 1)), $upto)"
		record_commits commit-growing "$upto"
		record call-growing worst "$upto" ms "$answer"
		worst=$(tail -n 1 "$work/sorted" | awk -v worst="$worst" '{ v = $1 / 1000; print (v > worst ? v : worst) }')
		worst_call=$(awk -v v="$answer" -v worst="$worst_call" 'BEGIN { print (v > worst ? v : worst) }')
		made=$upto
	done
	record commit-growing worst-of-all "$made" ms "$worst"
	record call-growing worst-of-all "$made" ms "$worst_call"
	if [ -n "$growing_at_once" ]; then
		upto=$((made + growing_at_once))
		commits_beside $((3 + growing_at_once / 250000)) \
			"INSERT INTO growing SELECT 'key ' || n, 1 FROM generate_series($((made + 1)), $upto) AS n"
		record_commits commit-at-once "$growing_at_once"
		made=$upto
	fi
	must_have_counted growing $((made + commits_counted))
	perform "DROP FOREIGN TABLE growing"
}

growth_commits() {
	each_round commits_round
}

measure_growth() {
	local rounds=$few
	held_sizes=(1 10 100 1000)
	due_sizes=(1 10 100 1000)
	keys_sizes=(1 10 100 1000)
	growing_sizes=(2000 10000)
	growing_at_once=10000
	if [ -z "$quick" ]; then
		growing_sizes=(100000 250000 500000 1000000 1500000 2000000 3000000 4000000 5000000)
		growing_at_once=10000000
		due_sizes+=(10000 100000 1000000)
		keys_sizes+=(10000 100000)
		# a key takes up to a hundred bytes and some, and a segment of
		# memory may be half empty
		local size room
		room=$(df --output=avail -B 300 /dev/shm | tail -n 1)
		for size in 10000 100000 1000000 10000000; do
			if ((size > room)); then
				say "no room in /dev/shm for $size keys; leaving that out"
				growing_at_once=
			else
				held_sizes+=("$size")
			fi
		done
	fi
	bench_server growth "shared_buffers = '512MB'"
	load growth.sql
	growth_commits
	growth_keys
	growth_due
	growth_latency
	growth_held
	stop_server
}
