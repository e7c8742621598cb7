# shellcheck shell=bash disable=SC2034,SC2154 # it shares variables with dev/bench
#
# Many keys in one INSERT, over the same rows into an unlogged table without
# index; the commits included.  And the commit alone, of keys that were counted in
# savepoints that are not released, over that of the same without savepoints.

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

# The COMMIT of that many new keys, with a savepoint before each of a thousand
# statements, or with none.
savepoints_run() {
	local i each=$((million / savepoints))
	perform "CREATE FOREIGN TABLE in_parts (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'store', interval '1h')"
	{
		echo "BEGIN;"
		for ((i = 0; i < savepoints; i++)); do
			[ "$1" = none ] || echo "SAVEPOINT s$i;"
			echo "INSERT INTO in_parts SELECT 'key ' || to_char(n, 'FM000000000000'), 1" \
				"FROM generate_series($((i * each + 1)), $(((i + 1) * each))) n;"
		done
		printf '%s\n' '\timing on' 'COMMIT;'
	} >"$work/savepoints.sql"
	record commit "savepoints-$1" "$million" ms "$(sql -f "$work/savepoints.sql" | sed -n 's/^Time: \([0-9.]*\) ms.*/\1/p')"
	must_have_counted in_parts $((savepoints * each))
	perform "DROP FOREIGN TABLE in_parts"
	wait_until_freed
}

savepoints_round() {
	local which
	while read -r which; do
		savepoints_run "$which"
	done < <(in_turn none open)
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
	local rounds=$few savepoints=1000
	((million >= savepoints)) || savepoints=$million
	bench_server bulk "shared_buffers = '512MB'"
	perform "CREATE TABLE source AS SELECT 'key ' || to_char(n, 'FM000000000000') AS key FROM generate_series(1, $million) AS n"
	perform "VACUUM ANALYZE source"
	each_round bulk_round
	each_round savepoints_round
	stop_server
}
