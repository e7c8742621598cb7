# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What it costs that a buffer is durable: beside a table with a row for each
# increment, and beside a buffer that is not durable; and what becomes of the
# ledger.  Commits are on disk before they return, as by default.

durable_clients=64
declare -A durable_counted

# durable_run WHO: transactions with one increment each.
durable_run() {
	local script=$1
	case $1 in
	durable | soft) script=increment_$1 ;;
	append) start_roll_up ;;
	esac
	run_pgbench "$durable_clients" -f "$root/bench/$script.pgbench"
	[ "$1" != append ] || stop_roll_up
	durable_counted[$1]=$((${durable_counted[$1]:-0} + ntransactions))
	record one "$1" "$durable_clients" 'increments/s' "$tps"
}

# durable_tpcb WHO SYNCHRONOUS_COMMIT
durable_tpcb() {
	[ "$1" = none ] ||
		perform "CREATE TRIGGER counting AFTER INSERT ON pgbench_history FOR EACH ROW EXECUTE FUNCTION sb_trigger('branches', 'bid')"
	perform "VACUUM pgbench_branches, pgbench_tellers"
	PGOPTIONS="-c synchronous_commit=$2" run_pgbench 8 -b tpcb-like
	[ "$1" = none ] || perform "DROP TRIGGER counting ON pgbench_history"
	[ "$1" = none ] || durable_counted[branches]=$((${durable_counted[branches]:-0} + ntransactions))
	record "tpc-b-$2" "$1" 8 'transactions/s' "$tps"
	perform "TRUNCATE pgbench_history"
}

durable_flush() { # WHO
	perform "TRUNCATE stored"
	perform "INSERT INTO stored SELECT key, 1 FROM source"
	perform "VACUUM ANALYZE stored"
	perform "CHECKPOINT"
	perform "INSERT INTO flush_$1 SELECT key, 1 FROM source ORDER BY id"
	record flush "$1" "$hundred_thousand" ms "$(milliseconds "SELECT sb_drain('flush_$1')")"
	must_be "what flush_$1 has stored" "$((2 * hundred_thousand))" "SELECT sum(n) FROM stored"
}

durable_round() {
	local who
	while read -r who; do
		durable_run "$who"
	done < <(in_turn durable insert soft append update)
	while read -r who; do
		durable_tpcb "$who" on
	done < <(in_turn none durable)
	while read -r who; do
		durable_tpcb "$who" off
	done < <(in_turn none durable)
	((round > few)) || while read -r who; do
		durable_flush "$who"
	done < <(in_turn durable soft)
}

# Bytes of WAL that a transaction takes which increments one key of 16 bytes,
# without those of one that only commits.
durable_wal() {
	record wal durable 1 bytes "$(psql -X -q -A -t -v ON_ERROR_STOP=1 <<'SQL'
SELECT sb_increment('/articles/123456', 1, 'durable') \gset
SELECT pg_current_wal_insert_lsn() AS a \gset
SELECT sb_increment('/articles/123456', 1, 'durable') \gset
SELECT pg_current_wal_insert_lsn() AS b \gset
SELECT pg_current_xact_id() \gset
SELECT pg_current_wal_insert_lsn() AS c \gset
SELECT (:'b'::pg_lsn - :'a'::pg_lsn) - (:'c'::pg_lsn - :'b'::pg_lsn);
SQL
)"
	durable_counted[durable]=$((durable_counted[durable] + 2))
}

# The worst of commits, from a log of pgbench's, without the first ones of a session.
durable_worst() { # LOG
	cat "$1".* | awk '$2 > 5 { print $3 }' | sort -n | tail -n 1 | awk '{ print $1 / 1000 }'
	rm "$1".*
}

# While clients count 10,000 keys, the ledger is rotated again and again, because
# it is small.
durable_rotations() {
	local log=$work/log/rotations size
	for size in 1GB 4MB; do
		perform "ALTER SYSTEM SET statbuffer.ledger_size = '$size'"
		perform "SELECT pg_reload_conf()"
		sleep 0.2
		run_pgbench 8 -f "$root/bench/increment_durable_uniform.pgbench" -D keys="$ten_thousand" -l --log-prefix="$log"
		record worst-commit "ledger-$size" 8 ms "$(durable_worst "$log")"
		durable_counted[keys]=$((${durable_counted[keys]:-0} + ntransactions))
	done
	perform "ALTER SYSTEM RESET statbuffer.ledger_size"
	perform "SELECT pg_reload_conf()"
}

# The ledger after ten million increments of 10,000 keys.
durable_size() {
	local n=$((10 * million)) done_
	for ((done_ = 0; done_ < n; done_ += ten_thousand)); do
		echo "INSERT INTO keys SELECT 'key ' || i, 1 FROM generate_series(1, $ten_thousand) AS i;"
	done | psql -X -q -v ON_ERROR_STOP=1 >/dev/null
	durable_counted[keys]=$((${durable_counted[keys]:-0} + n))
	record ledger-size durable "$n" MB \
		"$(ask "SELECT (pg_relation_size('sb_ledger_0') + pg_relation_size('sb_ledger_1')) / 1048576.0")"
}

# A crash with a million keys, and the start after it, with clients that count.
durable_recovery() {
	local log=$work/log/recovery began
	perform "INSERT INTO recovered SELECT 'key ' || to_char(n, 'FM000000000000'), 1 FROM generate_series(1, $million) AS n"
	# what is recovered is due at once
	perform "ALTER FOREIGN TABLE recovered OPTIONS (ADD stopped 'true')"
	pg_ctl stop -w -m immediate >/dev/null
	pg_ctl start -w -l "$server_log" >/dev/null
	began=$(date +%s%N)
	run_pgbench 4 -f "$root/bench/increment_durable.pgbench" -l --log-prefix="$log" &
	while [ "$(ask "SELECT durable FROM sb_stat_buffers WHERE buffer = 'recovered'")" != on ]; do
		sleep 0.02
	done
	record recovery durable "$million" s "$(awk -v ns=$(($(date +%s%N) - began)) 'BEGIN { print ns / 1e9 }')"
	must_be "what was recovered" "$million|$million" "SELECT count(*), sum(count) FROM recovered"
	wait $!
	durable_counted[durable]=$((durable_counted[durable] + $(cat "$log".* | wc -l)))
	record worst-commit recovery 4 ms "$(durable_worst "$log")"
	perform "TRUNCATE recovered"
}

measure_durable() {
	local scale=10 buffer
	[ -z "$quick" ] || scale=1
	# start_roll_up and stop_roll_up
	# shellcheck source=bench/throughput.sh
	. "$root/bench/throughput.sh"
	bench_server durable "shared_preload_libraries = 'statbuffer'" "shared_buffers = '512MB'"
	pgbench -i -q -s "$scale" >"$work/log/pgbench.out" 2>&1 </dev/null || {
		cat "$work/log/pgbench.out"
		die "could not initialize pgbench"
	}
	load durable.sql keys="$hundred_thousand"

	each_round durable_round
	durable_wal
	durable_rotations
	durable_size
	durable_recovery

	for buffer in durable soft branches keys; do
		drain "$buffer"
		must_be "what $buffer has stored" "${durable_counted[$buffer]}" \
			"SELECT coalesce(sum(n), 0) FROM totals_of WHERE buffer = '$buffer'"
	done
	must_be "what was updated" "${durable_counted[update]}" "SELECT sum(n) FROM hot"
	must_be "what was inserted" "${durable_counted[insert]}" "SELECT count(*) FROM inserted"
	must_be "what was appended" "${durable_counted[append]}" "SELECT sum(n) FROM totals"
	stop_server
}
