# What becomes of counts and workers when buffers and what they need are
# altered, moved, dropped and made anew, at the worst moment: while a handler
# is in the middle of a call, while sessions count, while nobody looks.
#
# Every statement comes from a session of its own that has not called a
# function of ours.  It must come to its end (statement_timeout guards that),
# and no count may go without a word.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my ($node, $how, $preloaded);

sub sql { return $node->safe_psql($db, $_[0]); }

# A statement that must fail; returns what it says.
sub error_of
{
	my ($statement, $database) = @_;
	my ($status, $out, $err) = $node->psql($database // $db, $statement);

	isnt($status, 0, "$how: refused: $statement");
	return $err;
}

# A statement in the background.
my $statements = 0;

sub start_statement
{
	my ($statement, $database) = @_;
	my $session = { statement => $statement, out => '', err => '', name => 'ddl ' . ++$statements };

	$session->{run} = IPC::Run::start(
		[
			'psql', '-XqAt', '-v', 'ON_ERROR_STOP=1',
			'-d', $node->connstr($database // $db) . " application_name='$session->{name}'",
			'-c', $statement
		],
		'<', \undef, '>', \$session->{out}, '2>', \$session->{err});
	return $session;
}

sub wait_for_waiting
{
	my ($session, $what) = @_;

	wait_for($node, $db, qq{
			SELECT wait_event_type = '$what' FROM pg_stat_activity
			WHERE application_name = '$session->{name}' AND state = 'active'},
		"$how: waits: $session->{statement}");
	return;
}

sub finish_statement
{
	my ($session) = @_;

	ok($session->{run}->finish, "$how: done: $session->{statement}") or diag($session->{err});
	is($session->{err} =~ s/NOTICE:.*\n(DETAIL:.*\n)?(and .*\n|drop cascades.*\n)*//r, '', "$how: without a word");
	return;
}

# Makes a buffer, and keeps its handler in the middle of a call with a key 'k'
# that was counted 5; another 2 for it, and 100 for another key, are held
# meanwhile.  Returns the gate that lets the handler go on.
sub make_busy
{
	my ($name, $options) = @_;
	my $gate = close_gate($node, $db);

	make_buffer($node, $db, $name, "interval '20ms', timeout '1h'" . ($options // ''));
	sql(qq{
		ALTER TABLE ${name}_calls ADD who text DEFAULT current_user;
		GRANT ALL ON ${name}_calls, ${name}_bad TO PUBLIC});
	increment($node, $db, $name, 'k', 5);
	hold_more($name);
	return $gate;
}

sub hold_more
{
	my ($name) = @_;

	wait_for($node, $db, qq{
			SELECT in_flight = 5 FROM sb_stat_buffers WHERE buffer = '$name'::regclass},
		"$how, $name: its handler is in the middle of a call");
	increment($node, $db, $name, 'k', 2);
	increment($node, $db, $name, 'other', 100);
	return;
}

# The statement has to wait for the call, and then it comes through.
sub run_while_busy
{
	my ($statement, $gate) = @_;
	my $session = start_statement($statement);

	wait_for_waiting($session, 'Lock');
	open_gate($gate);
	finish_statement($session);
	return;
}

# The log tells of counts that went with their buffer.
sub wait_for_dropped
{
	my ($count, $keys, $offset, $what) = @_;

	$node->wait_for_log(
		qr/dropped the counts of a buffer that does not exist any more.*\n.* held (?:a count|counts) of $count .*in $keys key/, $offset);
	pass("$how, $what: the log tells what was dropped");
	return;
}

# A buffer whose keys are not due for long needs no worker.
sub wait_for_rest
{
	my ($name) = @_;

	wait_for($node, $db, "SELECT pid IS NULL FROM sb_stat_buffers WHERE buffer = '$name'::regclass",
		"$how, $name: no worker is needed");
	return;
}

# The worker of a buffer that is gone.
sub wait_for_leaving
{
	my ($name) = @_;

	wait_for($node, $db, qq{
			SELECT count(*) = 0 FROM pg_stat_activity
			WHERE backend_type = 'statbuffer worker' AND query ~ '^$name\\M'},
		"$how, $name: its worker has left");
	return;
}

sub calls
{
	my ($name) = @_;

	return sql("SELECT key, sum(counter), who FROM ${name}_calls GROUP BY key, who ORDER BY key, who");
}

# --- buffers are dropped ----------------------------------------------------

sub test_drop
{
	my $offset = -s $node->logfile;
	my $gate = make_busy('dropped');

	run_while_busy('DROP FOREIGN TABLE dropped', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP FOREIGN TABLE');
	is(stored($node, $db, 'dropped'), '5', "$how, DROP FOREIGN TABLE: what was being stored is stored");
	wait_for_leaving('dropped');

	# It has no worker, because nothing is due for long.  Preloaded, the
	# statement has one come; otherwise the next worker of the database sees it.
	$offset = -s $node->logfile;
	make_buffer($node, $db, 'resting', q{interval '1h', timeout '100ms'});
	increment($node, $db, 'resting', 'k', 42);
	wait_for_rest('resting');
	sql('DROP FOREIGN TABLE resting');
	if (!$preloaded)
	{
		make_buffer($node, $db, 'next', q{interval '10ms', timeout '100ms'});
		increment($node, $db, 'next', 'k', 1);
	}
	wait_for_dropped(42, 1, $offset, 'DROP FOREIGN TABLE without a worker');

	# A server of the user's own takes its buffers along; ours can't be dropped.
	make_buffer($node, $db, 'unmoved', q{interval '1h'});
	like(error_of('DROP SERVER statbuffer CASCADE'),
		qr/cannot drop server statbuffer because extension statbuffer requires it/, "$how, DROP SERVER of the extension");
	like(error_of('DROP EXTENSION statbuffer'),
		qr/cannot drop extension statbuffer because other objects depend on it/, "$how, DROP EXTENSION without CASCADE");
	$offset = -s $node->logfile;
	$gate = make_busy('served');
	sql(q{
		CREATE SERVER another FOREIGN DATA WRAPPER statbuffer;
		CREATE FOREIGN TABLE elsewhere (key text NOT NULL, count bigint NOT NULL)
		SERVER another OPTIONS (handler 'served_store', interval '20ms', timeout '1h');
		SELECT sb_increment('k', 5, 'elsewhere')});
	hold_more('elsewhere');
	run_while_busy('DROP SERVER another CASCADE', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP SERVER CASCADE');
	wait_for_stored($node, $db, 'served', 5 + 107, "$how, DROP SERVER CASCADE: nothing else went with it");
	sql('DROP FOREIGN TABLE served');

	# All goes that a schema has: buffer, handler and where that stores.  What
	# is held there is not due for long: another call at this moment would wait
	# for the table, and the statement for the call.  The worker sees it, at the
	# latest, when it wants to leave.
	$offset = -s $node->logfile;
	sql(q{
		CREATE SCHEMA app;
		CREATE TABLE app.calls (key text, counter bigint);
		CREATE FUNCTION app.store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			INSERT INTO app.calls VALUES (key, counter);
			PERFORM pg_advisory_xact_lock_shared(4713);
		END
		$$;
		CREATE FOREIGN TABLE app.hits (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'app.store', interval '1h', timeout '3s')});
	$gate = close_gate($node, $db);
	increment($node, $db, 'app.hits', 'k', 5);
	sql(q{SELECT sb_flush_all('app.hits')});
	hold_more('app.hits');
	run_while_busy('DROP SCHEMA app CASCADE', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP SCHEMA CASCADE');
	wait_for_leaving('hits');
	return;
}

# --- in one transaction with increments -------------------------------------

sub test_drop_in_transaction
{
	my $offset = -s $node->logfile;

	for my $case (
		[ 'DROP after increments', q{
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief}, undef ],
		[ 'DROP after increments, rolled back', q{
			SELECT sb_increment('k', 5, 'brief');
			SAVEPOINT s;
			DROP FOREIGN TABLE brief;
			ROLLBACK TO s;
			SELECT sb_increment('k', 2, 'brief')}, 7 ],
		[ 'DROP and increments, rolled back', q{
			SAVEPOINT s;
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief;
			ROLLBACK TO s}, 0 ],
		[ 'DROP after increments of another one', q{
			SELECT sb_increment('k', 5, 'brief'), sb_increment('k', 1000, 'other');
			DROP FOREIGN TABLE other}, 5 ],
		[ 'DROP and CREATE of the same name', q{
			SELECT sb_increment('k', 5, 'brief');
			DROP FOREIGN TABLE brief;
			CREATE FOREIGN TABLE brief (key text NOT NULL, count bigint NOT NULL)
			SERVER statbuffer OPTIONS (handler 'brief_store', interval '1h');
			SELECT sb_increment('k', 9, 'brief')}, 9 ],
		[ 'RENAME of two into each other', q{
			SELECT sb_increment('k', 5, 'brief'), sb_increment('k', 1000, 'other');
			ALTER FOREIGN TABLE brief RENAME TO swap;
			ALTER FOREIGN TABLE other RENAME TO brief;
			ALTER FOREIGN TABLE swap RENAME TO other;
			SELECT sb_increment('k', 3, 'brief')}, 1003 ])
	{
		my ($what, $statements, $expected) = @$case;

		make_buffer($node, $db, 'brief', q{interval '1h'});
		sql(qq{
			CREATE FOREIGN TABLE other (key text NOT NULL, count bigint NOT NULL)
			SERVER statbuffer OPTIONS (handler 'brief_store', interval '1h');
			BEGIN; $statements; COMMIT});
		if (defined $expected)
		{
			is(sql(q{SELECT coalesce(sb_count('k', 'brief'), 0)}), $expected, "$how, $what: counted");
			is(sql(q{SELECT sb_drain('brief')}), 't', "$how, $what: drained");
			is(stored($node, $db, 'brief'), $expected, "$how, $what: stored");
		}
		else
		{
			is(stored($node, $db, 'brief'), 0, "$how, $what: nothing is stored");
		}
		sql(q{
			DROP FOREIGN TABLE IF EXISTS brief, other;
			DROP TABLE brief_calls, brief_bad;
			DROP FUNCTION brief_store});
	}

	# What was counted outside of the transaction that made the buffer, has no
	# buffer when that is rolled back.
	$offset = -s $node->logfile;
	sql(q{
		BEGIN;
		CREATE FOREIGN TABLE never (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (interval '10ms', timeout '100ms');
		SELECT sb_async_increment('k', 11, 'never');
		ROLLBACK});
	wait_for_dropped(11, 1, $offset, 'CREATE, an async increment, ROLLBACK');
	return;
}

# --- owners -----------------------------------------------------------------

sub test_owners
{
	my ($gate, $offset);

	# A buffer changes hands: what is in flight is stored as the one, what is
	# held as the other.
	for my $case (
		[ 'passed_on', 'ALTER FOREIGN TABLE passed_on OWNER TO heir' ],
		[ 'reassigned', 'REASSIGN OWNED BY alice TO heir' ])
	{
		my ($name, $statement) = @$case;

		sql('CREATE ROLE alice LOGIN; CREATE ROLE heir LOGIN');
		$gate = close_gate($node, $db);
		make_buffer($node, $db, $name, q{interval '20ms', timeout '1h'});
		sql(qq{
			ALTER TABLE ${name}_calls ADD who text DEFAULT current_user;
			GRANT ALL ON ${name}_calls, ${name}_bad TO PUBLIC;
			ALTER FOREIGN TABLE $name OWNER TO alice});
		increment($node, $db, $name, 'k', 5);
		hold_more($name);
		like(error_of('DROP ROLE alice'), qr/cannot be dropped because some objects depend on it.*\n.*owner of foreign table $name/,
			"$how, $name: an owner can't be dropped");
		run_while_busy($statement, $gate);
		sql('DROP ROLE alice');
		wait_for_stored($node, $db, $name, 107, "$how, $name: everything is stored");
		is(calls($name), "k|5|alice\nk|2|heir\nother|100|heir",
			"$how, $name: what was in flight as the former owner, what was held as the new one");
		increment($node, $db, $name, 'k', 8);
		wait_for_stored($node, $db, $name, 115, "$how, $name: and on it goes");
		sql(qq{DROP FOREIGN TABLE $name; DROP ROLE heir});
	}

	# The same while there is no worker that could be told.  It is wanted five
	# seconds before the interval is over, and the role that was the owner when
	# the count was made is not there any more, or may not log in.
	sql('CREATE ROLE alice LOGIN; CREATE ROLE heir LOGIN; CREATE ROLE carol LOGIN');
	for my $name (qw(quiet muted))
	{
		make_buffer($node, $db, $name, q{interval '6s', timeout '100ms'});
		sql(qq{
			ALTER TABLE ${name}_calls ADD who text DEFAULT current_user;
			GRANT ALL ON ${name}_calls, ${name}_bad TO PUBLIC});
	}
	sql(q{
		ALTER FOREIGN TABLE quiet OWNER TO alice;
		ALTER FOREIGN TABLE muted OWNER TO carol;
		SELECT sb_increment('k', 5, 'quiet'), sb_increment('k', 5, 'muted')});
	wait_for_rest('quiet');
	sql(q{
		REASSIGN OWNED BY alice TO heir;
		DROP ROLE alice;
		ALTER FOREIGN TABLE muted OWNER TO heir;
		ALTER ROLE carol NOLOGIN});
	for my $name (qw(quiet muted))
	{
		wait_for_stored($node, $db, $name, 5, "$how, $name: stored after its owner has gone");
		is(calls($name), 'k|5|heir', "$how, $name: as the new one");
	}
	sql('DROP FOREIGN TABLE quiet, muted; DROP ROLE carol, heir');

	# A role goes with all that it owns, while a handler is at work; and while
	# there is no worker, where nobody is left to connect as.
	$offset = -s $node->logfile;
	sql('CREATE ROLE alice LOGIN');
	$gate = close_gate($node, $db);
	make_buffer($node, $db, 'owned', q{interval '20ms', timeout '1h'});
	sql(q{
		GRANT ALL ON owned_calls, owned_bad TO PUBLIC;
		ALTER FOREIGN TABLE owned OWNER TO alice});
	increment($node, $db, 'owned', 'k', 5);
	hold_more('owned');
	run_while_busy('DROP OWNED BY alice; DROP ROLE alice', $gate);
	wait_for_dropped(102, 2, $offset, 'DROP OWNED BY');
	is(stored($node, $db, 'owned'), '5', "$how, DROP OWNED BY: what was being stored is stored");
	wait_for_leaving('owned');

	$offset = -s $node->logfile;
	sql('CREATE ROLE alice LOGIN');
	make_buffer($node, $db, 'forsaken', q{interval '6s', timeout '100ms'});
	sql('ALTER FOREIGN TABLE forsaken OWNER TO alice');
	increment($node, $db, 'forsaken', 'k', 42);
	wait_for_rest('forsaken');
	sql('BEGIN; DROP OWNED BY alice; DROP ROLE alice; COMMIT');
	wait_for_dropped(42, 1, $offset, 'DROP OWNED BY without a worker');
	return;
}

# --- names and schemas ------------------------------------------------------

sub test_names
{
	my $gate;

	sql('CREATE SCHEMA attic');
	for my $case (
		[ 'renamed', 'ALTER FOREIGN TABLE renamed RENAME TO newly_named', 'newly_named' ],
		[ 'moved', 'ALTER FOREIGN TABLE moved SET SCHEMA attic', 'attic.moved' ],
		[ 'respelled', 'ALTER FOREIGN TABLE respelled RENAME key TO path', 'respelled' ])
	{
		my ($name, $statement, $new_name) = @$case;

		$gate = make_busy($name);
		run_while_busy($statement, $gate);
		wait_for_stored($node, $db, $name, 107, "$how, $name: everything is stored");
		increment($node, $db, $new_name, 'k', 8);
		wait_for_stored($node, $db, $name, 115, "$how, $name: and on it goes");
		wait_for($node, $db, "SELECT state = 'running' AND pending = 0 FROM sb_stat_buffers WHERE buffer = '$new_name'::regclass",
			"$how, $name: the view knows it");
		sql("DROP FOREIGN TABLE $new_name");
	}
	sql('DROP SCHEMA attic');

	# Sessions count while its name, schema, options and owner change all the
	# time.  They know it by its number.
	make_buffer($node, $db, 'wanderer', q{interval '10ms'});
	sql(q{
		CREATE ROLE traveller LOGIN;
		CREATE SCHEMA abroad;
		GRANT USAGE ON SCHEMA abroad TO PUBLIC;
		GRANT ALL ON wanderer_calls, wanderer_bad TO PUBLIC});
	my $relid = sql(q{SELECT 'wanderer'::regclass::oid});
	my @clients = map { start_statement(qq{
			DO \$\$
			BEGIN
				FOR i IN 1 .. 1000 LOOP
					PERFORM sb_increment('k' || i % 5, 1, $relid\::oid::regclass);
					COMMIT;
					PERFORM pg_sleep(0.001);
				END LOOP;
			END
			\$\$})
	} 1 .. 3;
	for (1 .. 5)
	{
		sql('ALTER FOREIGN TABLE wanderer RENAME TO pilgrim');
		sql(q{ALTER FOREIGN TABLE pilgrim OPTIONS (SET interval '1h')});
		sql('ALTER FOREIGN TABLE pilgrim SET SCHEMA abroad');
		sql('ALTER FOREIGN TABLE abroad.pilgrim OWNER TO traveller');
		sql(q{ALTER FOREIGN TABLE abroad.pilgrim OPTIONS (SET interval '10ms')});
		sql('ALTER FOREIGN TABLE abroad.pilgrim RENAME TO wanderer');
		sql('ALTER FOREIGN TABLE abroad.wanderer OWNER TO CURRENT_USER');
		sql('ALTER FOREIGN TABLE abroad.wanderer SET SCHEMA public');
	}
	finish_statement($_) for @clients;
	wait_for_stored($node, $db, 'wanderer', 3000, "$how, wanderer: everything is stored");
	sql('DROP FOREIGN TABLE wanderer; DROP SCHEMA abroad; DROP ROLE traveller');
	return;
}

# --- handlers and where they store ------------------------------------------

sub test_handlers
{
	my $gate;
	my $kept = q{SELECT state = 'failing' AND pending = 102 AND in_flight = 0 FROM sb_stat_buffers WHERE buffer = '%s'::regclass};
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
		like(sql("SELECT last_error FROM sb_stat_buffers WHERE buffer = '$name'::regclass"),
			qr/handler function ${name}_store.* does not exist/, "$how, $name: the view tells why");
		sql($replacement{$form} =~ s/%s/$name/gr);
		wait_for_stored($node, $db, $name, 107, "$how, $name: everything is stored with the new one");
		wait_for($node, $db, "SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = '$name'::regclass",
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
			FROM sb_stat_buffers WHERE buffer = 'homeless'::regclass},
		"$how, homeless: counts are kept while the table is not there");
	sql('CREATE TABLE homeless_calls (key text, counter bigint, at timestamptz)');
	wait_for_stored($node, $db, 'homeless', 107, "$how, homeless: everything is stored when there is one again");
	wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'homeless'::regclass},
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

# --- key columns ------------------------------------------------------------

# Preloaded, the worker is told when columns are altered.  Otherwise it looks
# again at counts that it could not store when a minute is over, or when
# somebody asks for a flush.
sub have_it_looked_at
{
	my ($name) = @_;

	sql("SELECT sb_flush_all('$name')") if !$preloaded;
	return;
}

sub test_key_columns
{
	my ($gate, $offset);
	my $held = q{SELECT state, pending FROM sb_stat_buffers WHERE buffer = '%s'::regclass};

	# A column more, which also happens to look like a count: what was counted
	# before stays apart, until the column goes again.
	$gate = make_busy('widened');
	run_while_busy('ALTER FOREIGN TABLE widened ADD n bigint NOT NULL DEFAULT 1', $gate);
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 102) FROM (%s) AS s}, sprintf($held, 'widened')),
		"$how, widened: what was counted before is kept, and the buffer fails");
	like(sql(q{SELECT last_error FROM sb_stat_buffers WHERE buffer = 'widened'::regclass}),
		qr/before the key columns were altered/, "$how, widened: the view tells why");
	is(sql(q{SELECT count(*) FROM widened}), '0', "$how, widened: it is not to be seen");
	sql(q{
		CREATE FUNCTION widened_store(key text, second bigint, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO widened_calls VALUES (key || '/' || second, counter) $$;
		SELECT sb_increment(ROW('k', 3), 8, 'widened')});
	wait_for_stored($node, $db, 'widened', 13, "$how, widened: what is counted with it is stored");
	sql('ALTER FOREIGN TABLE widened DROP n');
	have_it_looked_at('widened');
	wait_for_stored($node, $db, 'widened', 115, "$how, widened: what was counted before is stored when it is gone");
	is(sql('SELECT key, sum(counter) FROM widened_calls GROUP BY key ORDER BY key'),
		"k|7\nk/3|8\nother|100", "$how, widened: each as what it was counted");
	wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'widened'::regclass},
		"$how, widened: the buffer works again");
	sql('DROP FOREIGN TABLE widened');

	# A column that makes it no buffer at all.
	$gate = make_busy('misshapen', q{, backoff '100ms'});
	run_while_busy('ALTER FOREIGN TABLE misshapen ADD remark text', $gate);
	wait_for($node, $db, q{
			SELECT state = 'failing' AND pending = 102 AND last_error LIKE '%does not have the shape of a buffer%'
			FROM sb_stat_buffers WHERE buffer = 'misshapen'::regclass},
		"$how, misshapen: counts are kept, and the buffer fails");
	sql('ALTER FOREIGN TABLE misshapen DROP remark');
	wait_for_stored($node, $db, 'misshapen', 107, "$how, misshapen: everything is stored when the column is gone");
	wait_for($node, $db, q{SELECT state = 'running' FROM sb_stat_buffers WHERE buffer = 'misshapen'::regclass},
		"$how, misshapen: the buffer works again");
	sql('DROP FOREIGN TABLE misshapen');

	# A column of the key less, with its type.  It comes back when all columns
	# after it are made anew, too.
	sql(q{
		CREATE TYPE mood AS ENUM ('fine', 'bad');
		CREATE TABLE narrowed_calls (key text, counter bigint);
		CREATE FUNCTION narrowed_store(m text, path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (m || ' ' || path, counter) $$;
		CREATE FUNCTION narrowed_store(m mood, path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (m || ' ' || path, counter) $$;
		CREATE FUNCTION narrowed_store(path text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO narrowed_calls VALUES (path, counter) $$;
		CREATE FOREIGN TABLE narrowed (m mood NOT NULL, path text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'narrowed_store', interval '1h', timeout '1h', backoff '100ms');
		INSERT INTO narrowed VALUES ('fine', '/', 5), ('bad', '/', 7);
		SELECT sb_start('narrowed')});
	sql('ALTER FOREIGN TABLE narrowed DROP m');
	sql(q{SELECT sb_increment('/', 100, 'narrowed'); SELECT sb_flush_all('narrowed')});
	wait_for_stored($node, $db, 'narrowed', 100, "$how, narrowed: what is counted without the column is stored");
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 12) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: what was counted before is kept, and the buffer fails");
	is(sql(q{
			BEGIN;
			ALTER FOREIGN TABLE narrowed DROP path, DROP count;
			ALTER FOREIGN TABLE narrowed ADD m mood NOT NULL, ADD path text NOT NULL, ADD count bigint NOT NULL;
			SELECT m, path, count FROM narrowed ORDER BY m;
			COMMIT}),
		"fine|/|5\nbad|/|7", "$how, narrowed: with the column made anew it is there again");
	have_it_looked_at('narrowed');
	wait_for_stored($node, $db, 'narrowed', 112, "$how, narrowed: and stored");
	is(sql('SELECT key, counter FROM narrowed_calls ORDER BY key'), "/|100\nbad /|7\nfine /|5",
		"$how, narrowed: as what it was counted");

	# With the type itself gone it can't; TRUNCATE ends that.
	sql(q{INSERT INTO narrowed VALUES ('fine', '/', 5)});
	sql('DROP TYPE mood CASCADE');
	sql(q{SELECT sb_increment('/', 1000, 'narrowed'); SELECT sb_flush_all('narrowed')});
	wait_for_stored($node, $db, 'narrowed', 1112, "$how, narrowed: what is counted without the type is stored");
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('failing', 5) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: what was counted with the type is kept, and the buffer fails");
	sql('TRUNCATE narrowed');
	wait_for($node, $db, sprintf(q{SELECT (state, pending) = ('running', 0) FROM (%s) AS s}, sprintf($held, 'narrowed')),
		"$how, narrowed: TRUNCATE discards it, and the buffer works again");
	is(sql(q{SELECT sb_drain('narrowed')}), 't', "$how, narrowed: drained");
	$offset = -s $node->logfile;
	sql(q{DROP FOREIGN TABLE narrowed; DROP TABLE narrowed_calls; DROP ROUTINE narrowed_store(text, bigint), narrowed_store(text, text, bigint)});

	# Another type of the same look, while the handler is busy with the old one.
	$gate = make_busy('retyped');
	sql(q{
		CREATE FUNCTION retyped_store(key varchar, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO retyped_calls VALUES ('varchar ' || key, counter) $$});
	run_while_busy('ALTER FOREIGN TABLE retyped ALTER key TYPE varchar(20)', $gate);
	sql(q{SELECT sb_increment('k', 8, 'retyped')});
	wait_for_stored($node, $db, 'retyped', 13, "$how, retyped: what is counted as the other type is stored");
	sql('ALTER FOREIGN TABLE retyped ALTER key TYPE text');
	have_it_looked_at('retyped');
	wait_for_stored($node, $db, 'retyped', 115, "$how, retyped: the rest, when it is altered back");
	is(sql('SELECT key, sum(counter) FROM retyped_calls GROUP BY key ORDER BY key'),
		"k|7\nother|100\nvarchar k|8", "$how, retyped: each as what it was counted");
	sql('DROP FOREIGN TABLE retyped');
	return;
}

# --- the extension ----------------------------------------------------------

sub test_extension
{
	my $offset;

	# The default buffer is where the extension is, whatever that is called.
	$db = 'library';
	$node->safe_psql('postgres', 'CREATE DATABASE library');
	sql(q{
		CREATE SCHEMA counting;
		CREATE EXTENSION statbuffer SCHEMA counting;
		CREATE TABLE stored (key text, counter bigint);
		CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM pg_advisory_xact_lock_shared(4713);
			INSERT INTO stored VALUES (key, counter);
		END
		$$;
		SELECT counting.sb_start()});
	sql(q{ALTER FOREIGN TABLE counting.sb_default OPTIONS (interval '20ms', timeout '3s')});
	my $gate = close_gate($node, $db);
	sql(q{SELECT counting.sb_increment('k', 5)});
	wait_for($node, $db, q{SELECT in_flight = 5 FROM counting.sb_stat_buffers}, "$how, sb_default: a handler is in the middle of a call");
	sql(q{SELECT counting.sb_increment('k', 2)});

	like(error_of('ALTER EXTENSION statbuffer SET SCHEMA public'),
		qr/extension "statbuffer" does not support SET SCHEMA/, "$how, ALTER EXTENSION SET SCHEMA");
	sql('ALTER SCHEMA counting RENAME TO tallies');
	is(sql(q{SELECT tallies.sb_count('k')}), '7', "$how, sb_default: found where the schema is called otherwise");
	sql(q{SELECT tallies.sb_increment('k', 10)});
	open_gate($gate);
	wait_for($node, $db, 'SELECT sum(counter) = 17 FROM stored', "$how, sb_default: and stored");

	sql(q{ALTER FOREIGN TABLE tallies.sb_default OPTIONS (SET interval '1h')});
	sql(q{SELECT tallies.sb_increment('k', 3)});
	sql(q{ALTER FOREIGN TABLE tallies.sb_default SET SCHEMA public});
	like(error_of(q{SELECT tallies.sb_increment('k')}), qr/there is no default buffer.*HINT/s,
		"$how, sb_default: elsewhere it is not the default one");
	is(sql(q{SELECT tallies.sb_count('k', 'sb_default')}), '3', "$how, sb_default: but one");
	sql('ALTER FOREIGN TABLE sb_default SET SCHEMA tallies');
	is(sql(q{SELECT tallies.sb_count('k')}), '3', "$how, sb_default: back again, it is");

	# Two buffers are busy when the extension is to go.
	sql(q{
		CREATE FOREIGN TABLE tallies.second (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'handle_flush', interval '1h', timeout '3s')});
	is(sql(q{SELECT tallies.sb_drain()}), 't', "$how, sb_default: drained");
	is(sql('SELECT sum(counter) FROM stored'), '20', "$how, sb_default: all is stored");
	$gate = close_gate($node, $db);
	sql(q{SELECT tallies.sb_increment('k', 5), tallies.sb_increment('k', 5, 'tallies.second')});
	sql(q{SELECT tallies.sb_flush_all(), tallies.sb_flush_all('tallies.second')});
	wait_for($node, $db, q{SELECT min(in_flight) = 5 FROM tallies.sb_stat_buffers}, "$how, DROP EXTENSION: handlers are in the middle of calls");
	sql(q{SELECT tallies.sb_increment('k', 30), tallies.sb_increment('k', 40, 'tallies.second')});

	$offset = -s $node->logfile;
	my $drop = start_statement('DROP EXTENSION statbuffer CASCADE');
	wait_for_waiting($drop, 'Lock');
	open_gate($gate);
	finish_statement($drop);
	wait_for_dropped(30, 1, $offset, 'DROP EXTENSION CASCADE, sb_default');
	wait_for_dropped(40, 1, $offset, 'DROP EXTENSION CASCADE, the other');
	wait_for_leaving($_) for qw(sb_default second);
	is(sql('SELECT sum(counter) FROM stored'), '30', "$how, DROP EXTENSION: what was being stored is stored");

	# Made anew elsewhere, it starts with nothing.
	sql(q{
		CREATE EXTENSION statbuffer;
		SELECT sb_start();
		SELECT sb_increment('k', 1)});
	is(sql(q{SELECT sb_drain()}), 't', "$how, CREATE EXTENSION again: drained");
	is(sql('SELECT sum(counter) FROM stored'), '31', "$how, CREATE EXTENSION again: only what is new is stored");
	$db = 'postgres';
	$node->safe_psql($db, 'DROP DATABASE library WITH (FORCE)');
	return;
}

# --- databases --------------------------------------------------------------

# A database with a handler that is in the middle of a call as long as there is
# a file: an advisory lock would need a session there.
sub make_busy_database
{
	my ($name, $file) = @_;

	append_to_file($file, 'shut') if !-e $file;
	$node->safe_psql('postgres', "CREATE DATABASE $name");
	$node->safe_psql($name, qq{
		CREATE EXTENSION statbuffer;
		CREATE TABLE hits_calls (key text, counter bigint);
		CREATE FUNCTION hits_store(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS \$\$
		BEGIN
			INSERT INTO hits_calls VALUES (key, counter);
			WHILE EXISTS (SELECT FROM pg_stat_file('$file', true) WHERE size IS NOT NULL) LOOP
				PERFORM pg_sleep(0.01);
			END LOOP;
		END
		\$\$;
		CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'hits_store', interval '20ms', timeout '1h')});
	increment($node, $name, 'hits', 'k', 5);
	wait_for($node, $name, q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how, database $name: a handler is in the middle of a call");
	increment($node, $name, 'hits', 'k', 2);
	increment($node, $name, 'hits', 'other', 100);
	return;
}

sub test_databases
{
	my $file = $node->basedir . '/shut';
	my $dropped = qr/dropped the counts of a database that does not exist any more.*\n.* held counts of/;
	my $offset;

	make_busy_database('patient', $file);

	# Handlers elsewhere are nobody else's business.
	$node->safe_psql('postgres', 'CREATE DATABASE innocent');
	$node->safe_psql('postgres', 'DROP DATABASE innocent');
	pass("$how: DROP DATABASE of another one does not wait for a handler");
	is($node->safe_psql('patient', 'SELECT in_flight FROM sb_stat_buffers'), '5', "$how: which is still at work");

	if (!$preloaded && major($node) >= 19)
	{
		# Nobody asks the worker to leave, but the server terminates it: what
		# its handler was given is given back.
		$node->safe_psql('postgres', 'ALTER DATABASE patient RENAME TO impatient');
		is($node->safe_psql('impatient', 'SELECT count(*) FROM hits_calls'), '0', "$how, RENAME: what the handler did is undone");
		$node->safe_psql('postgres', 'ALTER DATABASE impatient RENAME TO patient');
		wait_for($node, 'patient', q{SELECT in_flight > 0 AND in_flight + pending = 107 FROM sb_stat_buffers},
			"$how, RENAME: another worker goes on, with all of it");
		unlink $file or die $!;
		wait_for_stored($node, 'patient', 'hits', 107, "$how, RENAME: and stores it");

		# With the database everything goes.
		$offset = -s $node->logfile;
		append_to_file($file, 'shut');
		make_busy_database('doomed', $file);
		$node->safe_psql('postgres', 'DROP DATABASE doomed');
		$node->wait_for_log(qr/$dropped 107 altogether in 2 keys/, $offset);
		pass("$how, DROP DATABASE: the log tells what was dropped");

		increment($node, 'patient', 'hits', 'k', 5);
		wait_for($node, 'patient', q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how: the handler is in the middle of a call");
		increment($node, 'patient', 'hits', 'k', 2);
		increment($node, 'patient', 'hits', 'other', 100);
	}
	elsif (!$preloaded)
	{
		# Nobody asks the worker to leave.
		for my $statement ('DROP DATABASE patient', 'ALTER DATABASE patient RENAME TO impatient')
		{
			like(error_of($statement), qr/is being accessed by other users/, "$how: there is a worker");
		}
		is($node->safe_psql('patient', 'SELECT in_flight, pending FROM sb_stat_buffers'), '5|102', "$how: which goes on");
	}
	else
	{
		# These ask the workers to leave, and wait for the handlers.
		my $directory = $node->basedir . '/space';

		mkdir $directory or die $!;
		$node->safe_psql('postgres', "CREATE TABLESPACE space LOCATION '$directory'");
		make_busy_database($_, $file) for qw(doomed old_name original homebody);
		$offset = -s $node->logfile;
		my @statements = map { start_statement($_, 'postgres') } (
			'DROP DATABASE doomed',
			'ALTER DATABASE old_name RENAME TO new_name',
			'CREATE DATABASE duplicate TEMPLATE original',
			'ALTER DATABASE homebody SET TABLESPACE space');
		wait_for_waiting($_, 'Extension') for @statements;
		unlink $file or die $!;
		finish_statement($_) for @statements;

		$node->wait_for_log(qr/$dropped 102 altogether in 2 keys/, $offset);
		pass("$how, DROP DATABASE: the log tells what was dropped");
		for my $database (qw(new_name original homebody patient))
		{
			wait_for_stored($node, $database, 'hits', 107, "$how, database $database: everything is stored");
		}
		is(stored($node, 'duplicate', 'hits'), '5', "$how, database duplicate: has what was stored, and no counts");
		is($node->safe_psql('duplicate', 'SELECT count(*) FROM hits'), '0', "$how, database duplicate: its buffer is empty");
		increment($node, 'duplicate', 'hits', 'k', 3);
		wait_for_stored($node, 'duplicate', 'hits', 8, "$how, database duplicate: and works");
		$node->safe_psql('postgres', "DROP DATABASE $_") for qw(new_name original homebody duplicate patient);
		$node->safe_psql('postgres', 'DROP TABLESPACE space');

		# A handler that takes too long: the statement does not wait for ever,
		# and the buffer goes on.  From 19 on the statement then has the worker
		# terminated, which gives back what it had taken.
		make_busy_database('patient', $file);
		if (major($node) >= 19)
		{
			$node->safe_psql('postgres', 'ALTER DATABASE patient RENAME TO impatient');
			is($node->safe_psql('impatient', 'SELECT count(*) FROM hits_calls'), '0', "$how: a handler takes its time, which ends");
			$node->safe_psql('postgres', 'ALTER DATABASE impatient RENAME TO patient');
			wait_for($node, 'patient', q{SELECT in_flight > 0 AND in_flight + pending = 107 FROM sb_stat_buffers},
				"$how: another worker goes on, with all of it");
		}
		else
		{
			like(error_of('DROP DATABASE patient'), qr/is being accessed by other users/, "$how: a handler takes its time");
			is($node->safe_psql('patient', 'SELECT in_flight, pending FROM sb_stat_buffers'), '5|102', "$how: and has it");
		}
		unlink $file or die $!;
		wait_for_stored($node, 'patient', 'hits', 107, "$how: everything is stored");
		append_to_file($file, 'shut');
		increment($node, 'patient', 'hits', 'k', 5);
		wait_for($node, 'patient', q{SELECT in_flight = 5 FROM sb_stat_buffers}, "$how: the handler is in the middle of a call");
		increment($node, 'patient', 'hits', 'k', 2);
		increment($node, 'patient', 'hits', 'other', 100);
	}

	# Who forces it does not wait for the handler.  What that has done is
	# undone with its database.
	$offset = -s $node->logfile;
	$node->safe_psql('postgres', 'DROP DATABASE patient WITH (FORCE)');
	$node->wait_for_log(qr/$dropped 107 altogether in 2 keys/, $offset);
	pass("$how, DROP DATABASE WITH (FORCE): the log tells what was dropped");
	unlink $file;
	return;
}

foreach (1, 0)
{
	$preloaded = $_;
	$how = $preloaded ? 'preloaded' : 'not preloaded';
	$node = new_node($preloaded ? 'preloaded' : 'plain',
		'statbuffer.max_workers = 10',
		q{statement_timeout = '120s'},
		$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');

	test_drop();
	test_drop_in_transaction();
	test_owners();
	test_names();
	test_handlers();
	test_options();
	test_key_columns();
	test_extension();
	test_databases();

	$node->stop;
	unlike(slurp_file($node->logfile), qr/PANIC|TRAP|was terminated by signal/, "$how: the server never crashed");
}

done_testing();
