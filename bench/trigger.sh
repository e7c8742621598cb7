# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# What a trigger that counts costs a transaction: pgbench's own, which is like
# that of TPC-B, with and without triggers on the table that it inserts into.
# Commits do not wait for the disk, or nothing but that would be seen.

trigger_clients=8

# As CREATE TRIGGER has them.
declare -A triggers=(
	[sb_trigger-row]="FOR EACH ROW EXECUTE FUNCTION sb_trigger('branch_hits', 'bid')"
	[sb_trigger-statement]="REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION sb_trigger('branch_hits', 'bid')"
	[plpgsql]="FOR EACH ROW EXECUTE FUNCTION count_by_plpgsql()"
	[update]="FOR EACH ROW EXECUTE FUNCTION count_by_update()"
)

trigger_run() {
	local who=$1
	[ "$who" = none ] ||
		perform "CREATE TRIGGER counting AFTER INSERT ON pgbench_history ${triggers[$who]}"
	perform "VACUUM pgbench_branches, pgbench_tellers"
	run_pgbench "$trigger_clients" -b tpcb-like
	[ "$who" = none ] || perform "DROP TRIGGER counting ON pgbench_history"
	record tpc-b "$who" "$trigger_clients" 'transactions/s' "$tps"
	must_be "the history after a run with $who" "$ntransactions" "SELECT count(*) FROM pgbench_history"
	perform "CALL account('$who')"
}

trigger_round() {
	local who
	while read -r who; do
		trigger_run "$who"
	done < <(in_turn none sb_trigger-row sb_trigger-statement plpgsql update)
}

measure_trigger() {
	local scale=10
	[ -z "$quick" ] || scale=1
	bench_server trigger "synchronous_commit = off"
	pgbench -i -q -s "$scale" >"$work/log/pgbench.out" 2>&1 </dev/null || {
		cat "$work/log/pgbench.out"
		die "could not initialize pgbench"
	}
	load trigger.sql

	each_round trigger_round

	drain branch_hits
	must_be_true "triggers count every row" \
		"SELECT count(*) = 0 FROM accounted FULL JOIN branch_counts USING (who, bid) WHERE accounted.n IS DISTINCT FROM branch_counts.n"
	stop_server
}
