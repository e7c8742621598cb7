# Buffers change hands, names and schemas, and their owners go, while a handler
# is in the middle of a call, while sessions count, and while there is no
# worker.  What is in flight is stored as the former owner, what is held as the
# new one.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

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
		like(error_of('DROP ROLE alice', $how), qr/cannot be dropped because some objects depend on it.*\n.*owner of foreign table $name/,
			"$how, $name: an owner cannot be dropped");
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
		wait_for($node, $db, "SELECT state = 'running' AND pending = 0 FROM sb_stat_buffers WHERE relid = '$new_name'::regclass",
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

test_with_servers(\&test_owners, \&test_names);

done_testing();
