# Handlers are replaced, dropped and made anew, the tables that they store in
# are dropped, rewritten and locked, and options are altered: while a handler
# is in the middle of a call, while sessions count, and while a session drains
# the buffer.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# --- handlers and where they store ------------------------------------------

sub test_handlers
{
	my $gate;
	my $kept = q{SELECT state = 'failing' AND pending = 102 AND in_flight = 0 FROM sb_stat_buffers WHERE relid = '%s'::regclass};
	my %replacement = (
		'one key' => q{
			CREATE FUNCTION %s_store(key text, counter bigint) RETURNS void
			LANGUAGE sql AS $$ INSERT INTO %s_calls VALUES (key, counter, now(), 'replacement') $$},
		'arrays' => q{
			CREATE FUNCTION %s_store(keys text[], counters bigint[]) RETURNS void
			LANGUAGE sql AS $$ INSERT INTO %s_calls SELECT k, n, now(), 'replacement' FROM unnest(keys, counters) AS u (k, n) $$});
	my $me = sql('SELECT current_user');

	# The handler is replaced, with another form, too, in the middle of a call:
	# that call is the old one's, the next ones the new one's.
	for my $form (sort keys %replacement)
	{
		my $name = 'replaced_with_' . $form =~ s/ /_/r;
		my $new = $replacement{$form} =~ s/%s/$name/gr;

		$gate = make_busy($name);
		sql($form eq 'one key' ? $new =~ s/CREATE/CREATE OR REPLACE/r : $new);
		open_gate($gate);
		wait_for_stored($node, $db, $name, 107, "$how, $name: everything is stored");
		is(calls($name), "k|5|$me\nk|2|replacement\nother|100|replacement",
			"$how, $name: the call that was made by the old one, the others by the new one");
		sql("DROP FOREIGN TABLE $name");
	}

	# It is dropped in the middle of a call, and comes back later.
	for my $form (sort keys %replacement)
	{
		my $name = 'dropped_for_' . $form =~ s/ /_/r;

		$gate = make_busy($name, q{, backoff '100ms'});
		sql("DROP FUNCTION ${name}_store(text, bigint)");
		open_gate($gate);
		wait_for($node, $db, sprintf($kept, $name), "$how, $name: counts are kept while there is no handler");
		is(calls($name), "k|5|$me", "$how, $name: the call that was made is done");
		like(sql("SELECT last_error FROM sb_stat_buffers WHERE relid = '$name'::regclass"),
			qr/handler function ${name}_store.* does not exist/, "$how, $name: the view tells why");
		sql($replacement{$form} =~ s/%s/$name/gr);
		wait_for_stored($node, $db, $name, 107, "$how, $name: everything is stored with the new one");
		wait_for($node, $db, "SELECT state = 'running' FROM sb_stat_buffers WHERE relid = '$name'::regclass",
			"$how, $name: the buffer works again");
		sql("DROP FOREIGN TABLE $name");
	}

	# The table is dropped that it stores in: the call that is under way fails,
	# and counts are kept until there is one again.
	$gate = make_busy('homeless', q{, backoff '100ms'});
	sql('DROP TABLE homeless_calls');
	open_gate($gate);
	wait_for($node, $db, q{
			SELECT state = 'failing' AND pending + in_flight = 107 AND last_error LIKE '%homeless_calls%does not exist%'
			FROM sb_stat_buffers WHERE buffer = 'homeless'},
		"$how, homeless: counts are kept while the table is not there");
	sql('CREATE TABLE homeless_calls (key text, counter bigint, at timestamptz)');
	wait_for_stored($node, $db, 'homeless', 107, "$how, homeless: everything is stored when there is one again");
	wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'homeless'},
		"$how, homeless: the buffer works again");
	sql('DROP FOREIGN TABLE homeless');

	# It is rewritten and locked all the time while sessions count.
	sql(q{
		CREATE TABLE totals (key text PRIMARY KEY, n bigint NOT NULL);
		CREATE FUNCTION store_total(keys text[], counters bigint[]) RETURNS void
		LANGUAGE sql AS $$
			INSERT INTO totals AS t SELECT * FROM unnest(keys, counters)
			ON CONFLICT (key) DO UPDATE SET n = t.n + EXCLUDED.n
		$$;
		CREATE FOREIGN TABLE kept_tidy (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'store_total', interval '10ms', backoff '50ms')});
	my @clients = map { start_statement(q{
			DO $$
			BEGIN
				FOR i IN 1 .. 1500 LOOP
					PERFORM sb_increment('k' || i % 20, 1, 'kept_tidy');
					COMMIT;
					PERFORM pg_sleep(0.001);
				END LOOP;
			END
			$$})
	} 1 .. 3;
	for (1 .. 5)
	{
		sql('VACUUM FULL totals');
		sql('CLUSTER totals USING totals_pkey');
		sql('REINDEX TABLE totals');
		sql('REINDEX TABLE CONCURRENTLY totals');
		sql('ALTER TABLE totals ADD note text DEFAULT clock_timestamp()');
		sql('ALTER TABLE totals DROP note');
	}
	finish_statement($_) for @clients;
	is(sql(q{SELECT sb_drain('kept_tidy')}), 't', "$how, kept_tidy: drained");
	is(sql('SELECT count(*), sum(n) FROM totals'), '20|4500', "$how, kept_tidy: everything is stored, once");

	# Who has locked the table and then wants to alter the buffer, while a
	# handler waits for the table: a deadlock that is noticed.  Whoever gives
	# in, the other comes through, and nothing is lost.
	my $session = $node->background_psql($db, on_error_stop => 0);
	$session->query_safe('BEGIN; LOCK totals');
	sql(q{SELECT sb_increment('k1', 1000, 'kept_tidy')});
	wait_for($node, $db, q{
			SELECT count(*) = 1 FROM pg_stat_activity
			WHERE backend_type = 'statbuffer worker' AND wait_event_type = 'Lock'},
		"$how, kept_tidy: a handler waits for the table");
	$session->query(q{ALTER FOREIGN TABLE kept_tidy OPTIONS (SET interval '20ms')});
	$session->query('COMMIT');
	$session->quit;
	wait_for($node, $db, 'SELECT sum(n) = 5500 FROM totals', "$how, kept_tidy: stored after a deadlock");
	sql('DROP FOREIGN TABLE kept_tidy; DROP FUNCTION store_total; DROP TABLE totals');
	return;
}

# --- options ----------------------------------------------------------------

sub test_options
{
	# What takes effect must not wait for the interval.
	my $gate = make_busy('optional');
	run_while_busy(q{ALTER FOREIGN TABLE optional OPTIONS (SET interval '1h')}, $gate);
	is(stored($node, $db, 'optional'), '5', "$how, optional: what was being stored is stored");
	is(sql(q{SELECT key, count FROM optional ORDER BY key}), "k|2\nother|100", "$how, optional: a longer interval holds back at once");
	sql(q{ALTER FOREIGN TABLE optional OPTIONS (SET interval '10ms')});
	wait_for_stored($node, $db, 'optional', 107, "$how, optional: a shorter one lets go at once");
	sql('DROP FOREIGN TABLE optional');

	$gate = make_busy('rehandled');
	sql(q{
		CREATE FUNCTION another_store(key text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO rehandled_calls VALUES (key, counter, now(), 'another') $$});
	run_while_busy(q{ALTER FOREIGN TABLE rehandled OPTIONS (SET handler 'another_store')}, $gate);
	wait_for_stored($node, $db, 'rehandled', 107, "$how, rehandled: everything is stored");
	is(calls('rehandled'), "k|2|another\nk|5|" . sql('SELECT current_user') . "\nother|100|another",
		"$how, rehandled: the call that was made by the old one, the others by the new one");
	sql('DROP FOREIGN TABLE rehandled; DROP FUNCTION another_store');

	# Who alters a buffer must not wait for who drains it, because the worker
	# waits for him: the first key's call is done, the second one's comes after.
	for my $case (
		[ 'drain alone', '', q{^t$} ],
		[ 'drain in a transaction that has read', 'SELECT count(*) FROM drained;', q{while another session waits to alter it} ])
	{
		my ($what, $before, $says) = @$case;

		$gate = make_busy('drained', q{, batch_size '1'});
		my $drain = start_statement("BEGIN; $before SELECT sb_drain('drained'); COMMIT");
		wait_for_waiting($drain, 'Extension');
		my $alter = start_statement(q{ALTER FOREIGN TABLE drained OPTIONS (SET interval '30ms')});
		wait_for_waiting($alter, 'Lock');
		open_gate($gate);
		$drain->{run}->finish;
		finish_statement($alter);
		like("$drain->{out}$drain->{err}", qr/$says/m, "$how, $what: comes to an end");
		wait_for_stored($node, $db, 'drained', 107, "$how, $what: everything is stored");
		sql(q{
			DROP FOREIGN TABLE drained;
			DROP TABLE drained_calls, drained_bad;
			DROP FUNCTION drained_store});
	}

	# It drains a buffer that is stopped or dropped meanwhile: an error.
	for my $case (
		[ q{ALTER FOREIGN TABLE drained OPTIONS (ADD stopped 'true')}, qr/buffer "drained" is stopped/ ],
		[ 'DROP FOREIGN TABLE drained', qr/relation with OID \d+ does not exist/ ])
	{
		my ($statement, $says) = @$case;

		$gate = make_busy('drained', q{, batch_size '1'});
		my $drain = start_statement(q{SELECT sb_drain('drained')});
		wait_for_waiting($drain, 'Extension');
		run_while_busy($statement, $gate);
		ok(!$drain->{run}->finish, "$how: sb_drain() and meanwhile: $statement");
		like($drain->{err}, $says, "$how: it tells why it has ended");
		sql(q{
			DROP FOREIGN TABLE IF EXISTS drained;
			DROP TABLE drained_calls, drained_bad;
			DROP FUNCTION drained_store});
	}
	return;
}

test_with_servers(\&test_handlers, \&test_options);

done_testing();
