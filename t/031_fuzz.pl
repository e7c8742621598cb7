# Random calls: several sessions call every function and use buffers in every
# way that SQL has, with arguments that were never meant for them, while
# handlers misbehave, definitions change and processes are cut off.
#
# Whatever the answers are, the server must not crash, no internal error may
# reach a user, nothing may be left behind (memory, keys, locks), and what was
# counted together with a ledger must be stored to the last one.
#
# STATBUFFER_FUZZ_CALLS says how many messages are sent, STATBUFFER_FUZZ_SEED
# sends others, and STATBUFFER_FUZZ_UNIT sends the messages of only
# one unit, and shows them.  With odd seeds the library is preloaded.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use FuzzCalls qw(roles surroundings definitions unit steady_unit);
use FuzzSession qw(simple);
use IO::Select;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time);

my $calls = $ENV{STATBUFFER_FUZZ_CALLS} || 8000;
my $seed = $ENV{STATBUFFER_FUZZ_SEED} || 1;
my $only = $ENV{STATBUFFER_FUZZ_UNIT};

note("STATBUFFER_FUZZ_CALLS=$calls STATBUFFER_FUZZ_SEED=$seed");

# Small enough that it fills up now and then
my $memory = '24MB';

my $node = new_node(
	'fuzz',
	'max_connections = 50',
	'max_worker_processes = 24',
	'max_prepared_transactions = 4',
	'statbuffer.max_workers = 8',
	"statbuffer.max_memory = '$memory'",
	'max_locks_per_transaction = 256',
	'autovacuum_naptime = 5s',
	'deadlock_timeout = 100ms',
	'statement_timeout = 1s',
	'lock_timeout = 300ms',
	'log_statement = none',
	'log_error_verbosity = verbose',
	'log_min_messages = warning',
	'client_min_messages = error',
	'jit = off',
	'fsync = off',
	$seed % 2 ? "shared_preload_libraries = 'statbuffer'" : ());
my $started = $node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()');

# --- the world --------------------------------------------------------------

my %databases = (postgres => 'UTF8', latin => 'LATIN1', bytes => 'SQL_ASCII');

sub admin
{
	my ($database) = @_;
	my $session = FuzzSession->new($node, $database);

	$session->query('SET statement_timeout = 0; SET lock_timeout = 0; SET application_name = admin');
	return $session;
}

$node->safe_psql('postgres', roles());
foreach my $database (grep { $_ ne 'postgres' } sort keys %databases)
{
	$node->safe_psql('postgres', "CREATE DATABASE $database ENCODING '$databases{$database}' LOCALE 'C' TEMPLATE template0");
	$node->safe_psql($database, 'CREATE EXTENSION statbuffer');
}
foreach my $database (sort keys %databases)
{
	my ($before, $after) = surroundings();

	$node->safe_psql($database, join(";\n", 'SET check_function_bodies = off', $before, definitions(), $after));
}

# How many keys there is room for, by whole thousands, in a buffer made for it
sub room
{
	my ($admin) = @_;
	my $keys = 0;

	$admin->query(q{CREATE FOREIGN TABLE s_room (key text, n bigint DEFAULT 1)
		SERVER statbuffer OPTIONS (handler 'take', interval '1d', timeout '0')});
	until ($admin->attempt("INSERT INTO s_room SELECT 'key ' || g, 1 FROM generate_series($keys + 1, $keys + 1000) g"))
	{
		$keys += 1000;
		die 'memory has no bound' if $keys > 1_000_000;
	}

	# A trigger counts the statement, for which there is room when some of the
	# keys have been flushed, as they are when memory is short.
	for (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return $keys if !defined $admin->attempt('DROP FOREIGN TABLE s_room');
		select(undef, undef, undef, 0.1);
	}
	die 'memory does not get free';
}

my $admin = admin('postgres');
my $room = $only ? 0 : room($admin);
note("room for $room keys");

# --- the load ---------------------------------------------------------------

my $number = $only // 0;
my $sent = 0;
my %errors;
my $lost = 0;
my $hung;

# Takes its messages from one unit after the other.
sub next_message
{
	my ($client) = @_;
	my $session = $client->{session};
	my $recover = $session->{status} eq 'E' ? delete $session->{message}{on_error} : undef;

	return { %{ simple($recover) }, plain => 1 } if $recover;
	while (!@{ $client->{messages} })
	{
		if ($client->{cleaning})
		{
			$client->{cleaning} = 0;
			return if $hung || $sent >= $calls || defined $only && $number > $only;
			$client->{unit} = $number;
			%FuzzCalls::function_oid = %{ $client->{oids} };
			$client->{messages} = [ unit($seed, $number++) ];
			note("unit $client->{unit}: $_->{text}") foreach defined $only ? @{ $client->{messages} } : ();
			next;
		}

		# a transaction that a unit has left, and what it has set
		$client->{cleaning} = 1;
		$client->{messages} = [
			map { +{ %{ simple($_) }, plain => 1 } }
			  ($session->in_transaction ? ('ROLLBACK') : ()),
			'RESET SESSION AUTHORIZATION', 'RESET ALL', 'DEALLOCATE ALL', 'DROP TABLE IF EXISTS t_made, t_void'
		];
	}
	return shift @{ $client->{messages} };
}

sub connect_client
{
	my ($client) = @_;

	$client->{session} = FuzzSession->new($node, $client->{database});
	$client->{session}{errors} = \%errors;
	$client->{oids} ||= { map { @$_ } $client->{session}->query(q{
		SELECT format('%s(%s)', proname,
			array_to_string(ARRAY(SELECT format_type(t, NULL) FROM unnest(proargtypes) t), ',')), oid
		FROM pg_proc WHERE probin LIKE '%statbuffer%'}) };
}

# A database that comes and goes, with counts in it
sub brief_database
{
	my $error = $admin->attempt('CREATE DATABASE brief TEMPLATE template0');

	if (!$error)
	{
		my $session = FuzzSession->new($node, 'brief');

		$session->query($_) foreach
		  'CREATE EXTENSION statbuffer',
		  "CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE sql AS 'SELECT pg_sleep(0.01)'",
		  'SELECT sb_start()',
		  "SELECT sb_increment('k' || g) FROM generate_series(1, 100) AS g";
		$session->close;
	}
	$admin->attempt($_) foreach
	  'SET statement_timeout = 10000',
	  'CREATE DATABASE copy TEMPLATE brief',
	  'ALTER DATABASE copy RENAME TO briefer',
	  'DROP DATABASE IF EXISTS briefer',
	  'DROP DATABASE IF EXISTS brief',
	  'SET statement_timeout = 0';
}

# What happens to processes, and to the bound of the memory
sub strike
{
	my $what = int rand 12;

	return brief_database() if rand(40) < 1;

	my $whom = $what < 4 ? "backend_type = 'statbuffer worker'"
	  : $what < 10 ? "application_name = 'fuzz'"
	  : "backend_type = 'statbuffer launcher' AND random() < 0.2";

	if ($what < 11)
	{
		my $how = rand(2) < 1 ? 'pg_terminate_backend' : 'pg_cancel_backend';

		$admin->query("SELECT $how(pid) FROM (SELECT pid FROM pg_stat_activity WHERE $whom ORDER BY random() LIMIT 1) p");
	}
	else
	{
		$admin->query('ALTER SYSTEM SET statbuffer.max_memory = ' . (rand(2) < 1 ? "'4MB'" : "'$memory'"));
		$admin->query('SELECT pg_reload_conf()');
	}
	$admin->query("ROLLBACK PREPARED '$_->[0]'")
	  foreach $admin->query("SELECT gid FROM pg_prepared_xacts WHERE prepared < now() - interval '2 seconds' AND database = current_database()");
}

my @clients = map { +{ database => $_, messages => [], cleaning => 0 } } qw(postgres postgres postgres latin latin bytes);
my $alive = eval {
	my $next_strike = time + 1;

	connect_client($_) foreach @clients;
	for (;;)
	{
		my $busy = 0;

		foreach my $client (@clients)
		{
			my $session = $client->{session};

			if ($session->is_idle && (my $message = next_message($client)))
			{
				$session->send($message);
				$sent++ unless $message->{plain};
			}
			$busy++ if !$session->is_idle;
			$hung //= "unit $client->{unit}: $session->{message}{text}"
			  if !$session->is_idle && time > $session->{since} + $PostgreSQL::Test::Utils::timeout_default;
		}
		last if $busy == 0 || $hung;

		my %client = map { fileno($_->{session}{socket}) => $_ } grep { !$_->{session}->is_idle } @clients;
		foreach my $socket (IO::Select->new(keys %client)->can_read(0.1))
		{
			my $client = $client{$socket};

			next if $client->{session}->receive;
			$lost++;
			connect_client($client);
		}
		if (time > $next_strike && !defined $only)
		{
			# draws of the units don't depend on those of the clock
			srand;
			strike();
			$next_strike = time + 0.3;
		}
	}
	1;
};
diag($@) if !$alive;
ok($alive, 'the server answers to the end');
is($hung, undef, 'each call comes back');
note("$sent calls in $number units, $lost connections lost");
note('errors: ' . join(', ', map { "$_ $errors{$_}" } sort { $errors{$b} <=> $errors{$a} } keys %errors));

# --- the log ----------------------------------------------------------------

# Internal errors that are not ours: PostgreSQL itself has no better words for
# it when something it is working with is dropped or altered at the same time.
my @not_ours = (

	# a parameter was said to be of this type
	qr/cache lookup failed for type 4294967295/,

	# JOIN ... USING of columns whose types have nothing in common
	qr/failed to find conversion function from \S.* to \S.*\n.*LOCATION:  coerce_type,/,

	# a parameter in binary of random bytes
	qr/unsupported jsonb version number/,

	# VACUUM and ANALYZE of foreign tables
	qr/WARNING:  01000: skipping "/);

sub check_log
{
	my $log = slurp_file($node->logfile);
	my @crashes = $log =~ /^.*(?:PANIC:|TRAP:|was terminated by signal|all server processes terminated).*$/mg;
	my @internal;
	my @warnings;

	while ($log =~ /^\S+ \S+ \S+ \[(\d+)\] (.*?(ERROR|FATAL|WARNING|LOG):  (XX\w{3}|01000|58\w{3}): .*)\n((?:.*\n){0,12})/mg)
	{
		my ($pid, $message, $severity, $state, $more) = ($1, $2, $3, $4, $5);

		# what else the same process says of it
		my @lines = grep { /\[$pid\]/ || !/^\d{4}-/ } split /\n/, $more;
		my $text = join "\n", $message, @lines[ 0 .. ($#lines < 5 ? $#lines : 5) ];

		next if grep { $text =~ $_ } @not_ours;
		push @{ $severity eq 'WARNING' ? \@warnings : \@internal }, $text;
	}
	is(scalar(@crashes), 0, 'no process crashes');
	diag($_) foreach @crashes;
	is(scalar(@internal), 0, 'no internal errors');
	is(scalar(@warnings), 0, 'no warnings of what was left behind');
	diag(substr $_, 0, 3000) foreach grep { defined } @internal[ 0 .. 9 ], @warnings[ 0 .. 9 ];
}

if (!$alive || $hung || defined $only)
{
	check_log();
	done_testing();
	exit;
}

# --- the reckoning ----------------------------------------------------------

my %admin = map { $_ => $_ eq 'postgres' ? $admin : admin($_) } keys %databases;

$_->{session}->close foreach @clients;
$admin->query('ALTER SYSTEM RESET statbuffer.max_memory');
$admin->query('SELECT pg_reload_conf()');
foreach my $database (sort keys %databases)
{
	my $session = $admin{$database};

	$session->query("ROLLBACK PREPARED '$_->[0]'")
	  foreach $session->query('SELECT gid FROM pg_prepared_xacts WHERE database = current_database()');
	$session->query('UPDATE mood SET failing = 0, rude = false');
	$session->query('DROP EVENT TRIGGER definitions');

	foreach my $buffer (map { $_->[0] } $session->query(q{
		SELECT ftrelid::regclass FROM pg_foreign_table WHERE ftrelid::regclass::text ~ '^(control|b_)' ORDER BY 1}))
	{
		$session->query("SELECT sb_start('$buffer')");
		is($session->value("SELECT sb_drain('$buffer', '180s')"), 't', "$database: $buffer is drained")
		  if $buffer eq 'control';
		next if $buffer eq 'control';
		my $drained = $session->value("SELECT sb_drain('$buffer', '180s')");
		is($drained, 't', "$database: $buffer is drained") if $drained ne 't';
	}

	# to the last one
	is( join(', ', map { join ' ', map { $_ // 'null' } @$_ } $session->query(q{
		SELECT key, l.n AS ledger, s.n AS stored
		FROM (SELECT key, sum(n) AS n FROM ledger GROUP BY key) l
		FULL JOIN (SELECT key, sum(n) AS n FROM stored WHERE key <> 'async' GROUP BY key) s USING (key)
		WHERE coalesce(l.n, 0) <> coalesce(s.n, 0) ORDER BY key LIMIT 20})),
		'',
		"$database: what the ledger has is stored");
	is($session->value('SELECT count(*) FROM control'), 0, "$database: and nothing else is held");
	my ($begun, $async, $ended) = @{ ($session->query(q{
		SELECT CASE WHEN b.is_called THEN b.last_value ELSE 0 END,
			(SELECT coalesce(sum(n), 0) FROM stored WHERE key = 'async'),
			CASE WHEN e.is_called THEN e.last_value ELSE 0 END
		FROM begun b, ended e}))[0] };
	ok($ended <= $async && $async <= $begun,
		"$database: asynchronous increments: $ended ended, $async stored, $begun begun");

	# What is still held is discarded, and then nothing is.  A buffer that was
	# altered into another shape can only be dropped, and one that is stopped or
	# whose owner can't log in has no worker to clean up.
	foreach my $buffer (map { $_->[0] } $session->query(q{
		SELECT ftrelid::regclass FROM pg_foreign_table t JOIN pg_foreign_server s ON s.oid = ftserver
		WHERE srvname = 'statbuffer' AND NOT pg_is_other_temp_schema((SELECT relnamespace FROM pg_class WHERE oid = ftrelid))}))
	{
		my $error = $session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (ADD timeout '100ms')");

		$error = $session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (SET timeout '100ms')") if $error;
		$session->attempt("ALTER FOREIGN TABLE $buffer OPTIONS (SET stopped 'false')");
		$error ||= $session->attempt("TRUNCATE $buffer");
		$error ||= $session->attempt("ALTER FOREIGN TABLE $buffer OWNER TO postgres");
		$session->query("DROP FOREIGN TABLE $buffer CASCADE") if $error;
	}
	wait_for($node, $database, q{
		SELECT count(*) = 0 FROM sb_stat_buffers WHERE keys <> 0 OR pending <> 0 OR in_flight <> 0},
		"$database: no buffer holds anything");
	diag(join ' ', map { $_ // 'null' } @$_) foreach $session->query(q{
		SELECT buffer, owner, state, keys, pending, in_flight, last_error
		FROM sb_stat_buffers WHERE keys <> 0 OR pending <> 0 OR in_flight <> 0});

	# in the database's encoding, however long they were
	is($session->attempt('SELECT length(last_error), upper(last_error) FROM sb_stat_buffers'),
		undef, "$database: errors can be read");
}

# Whatever was locked by calls is not any more.
wait_for($node, 'postgres', q{
	SELECT count(*) = 0 FROM pg_locks
	WHERE pid IS DISTINCT FROM pg_backend_pid() AND locktype IN ('relation', 'advisory', 'object')
	AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = pg_locks.pid AND backend_type LIKE '%autovacuum%')},
	'no locks are left');

# --- memory -----------------------------------------------------------------

# The same calls, again and again, in one session: after some rounds all that
# is to be cached is cached, and nothing must be added by the rest.
sub context_sizes
{
	my ($session) = @_;

	return map { $_->[0] => $_->[1] } $session->query(q{
		SELECT name, sum(used_bytes) FROM pg_backend_memory_contexts GROUP BY name});
}

my @units = map { [ steady_unit($seed, $_) ] } 1 .. 40;
my $session = FuzzSession->new($node, 'postgres');
my %before;
my %after;

for my $round (1 .. 10)
{
	%before = context_sizes($session) if $round == 6;
	foreach my $message (map { @$_ } @units)
	{
		$session->send($message);
		$session->wait or die "connection lost in: $message->{text}";
		$sent++;
	}
	next if !$session->in_transaction;
	$session->query('ROLLBACK');
}
%after = context_sizes($session);
foreach my $name (sort keys %after)
{
	my $growth = $after{$name} - ($before{$name} // 0);

	note("context $name: grew by $growth to $after{$name} bytes") if $growth > 0;
}
my $growth = 0;
$growth += $after{$_} foreach keys %after;
$growth -= $before{$_} foreach keys %before;
cmp_ok($growth, '<', 10_000, "memory of a session grows by $growth bytes in five rounds");
$session->close;

# Shared memory: there is as much room as there was.
$_->close foreach map { $admin{$_} } grep { $_ ne 'postgres' } keys %databases;
cmp_ok(room($admin), '>=', 0.9 * $room, 'there is as much room for keys as at first');

is($node->safe_psql('postgres', 'SELECT pg_postmaster_start_time()'), $started, 'the server has never restarted');
$node->stop('fast');
check_log();

done_testing();
