# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# Many keys in one INSERT, over the same rows into an unlogged table without
# index; the commits included.

bulk_run() {
	local insert="INSERT INTO ${1//-/_} SELECT key, 1 FROM source"
	record insert "$1" "$million" ms "$(milliseconds "$insert")"
}

# Keys that the buffer does not have, keys that it has, and the table.
bulk_round() {
	perform "CREATE UNLOGGED TABLE unlogged (key text NOT NULL, count bigint NOT NULL)"
	perform "CREATE FOREIGN TABLE new_keys (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h')"
	perform "CHECKPOINT"
	if ((round % 2)); then
		bulk_run unlogged
		bulk_run new-keys
	else
		bulk_run new-keys
		bulk_run unlogged
	fi
	perform "ALTER FOREIGN TABLE new_keys RENAME TO held_keys"
	bulk_run held-keys
	must_have_counted held_keys $((2 * million))
	must_be "what the buffer shows" "$million $((2 * million))" "SELECT count(*) || ' ' || sum(count) FROM held_keys"
	must_be "what the table has" "$million" "SELECT count(*) FROM unlogged"
	perform "DROP FOREIGN TABLE held_keys"
	perform "DROP TABLE unlogged"
	wait_until_freed
}

# A dropped buffer's keys are freed in the background.
wait_until_freed() {
	local i
	for ((i = 0; i < 600; i++)); do
		[ "$(ask "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker'")" != 0 ] || return 0
		sleep 0.1
	done
	die "$group: a worker does not leave"
}

measure_bulk() {
	local rounds=$few
	bench_server bulk "shared_buffers = '512MB'"
	perform "CREATE TABLE source AS SELECT 'key ' || to_char(n, 'FM000000000000') AS key FROM generate_series(1, $million) AS n"
	perform "VACUUM ANALYZE source"
	each_round bulk_round
	stop_server
}
